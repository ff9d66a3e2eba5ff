"""Changes of a layer's placement that relieve its slowest rank: swaps of two slots, and copies that replace others.

Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks, C changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, placed_layer, rank_s

GOOD_FRAC = 0.4
"""A swap is taken without a look at further ranks when it closes this share of the gap between two ranks."""
EVEN_FRAC = 5e-4
"""Ranks that finish within this of each other are even enough."""
LEAST_GAIN_FRAC = 1e-9
"""Smaller gains are rounding."""


class Change(NamedTuple):
    """``expert`` goes into ``slot``, and ``other_expert`` into ``other_slot`` if that is not -1. ``worst_s``: the slowest of
    the ranks concerned, after it."""

    slot: int
    expert: int
    other_slot: int
    other_expert: int
    worst_s: float


@compiled
def best_swap(layer: Layer, table: CostTable, limits: Limits, thorough: bool) -> Change:
    """The swap of a slot of the slowest rank for one of another that leaves the slower of the two fastest.

    Ranks are tried from the fastest on; unless ``thorough``, a good swap ends the search.
    """
    slowest = int(np.argmax(layer.seconds_R))
    worst_s = layer.seconds_R[slowest]
    best = Change(-1, -1, -1, -1, worst_s * (1.0 - LEAST_GAIN_FRAC))
    node = slowest // limits.ranks_per_node
    first = node * limits.ranks_per_node
    order = np.argsort(layer.seconds_R[first : first + limits.ranks_per_node], kind="mergesort") + first
    for rank in order:
        gap_s = worst_s - layer.seconds_R[rank]
        if rank == slowest or gap_s <= 0.0 or (not thorough and best.worst_s < worst_s - GOOD_FRAC * gap_s):
            break
        for slot in range(slowest * limits.slots_per_rank, (slowest + 1) * limits.slots_per_rank):
            expert = layer.slot_S[slot]
            if layer.holds_ER[expert, rank] >= limits.most_alike:
                continue
            tokens = layer.load_E[expert] / layer.copies_E[expert]
            active = active_of(tokens)
            for other_slot in range(rank * limits.slots_per_rank, (rank + 1) * limits.slots_per_rank):
                other = layer.slot_S[other_slot]
                less = tokens - layer.load_E[other] / layer.copies_E[other]
                if less <= 0.0 or layer.holds_ER[other, slowest] >= limits.most_alike:
                    continue
                fewer = active - active_of(tokens - less)
                here_s = rank_s(table, slowest, layer.tokens_R[slowest] - less, layer.active_R[slowest] - fewer)
                if here_s < best.worst_s:
                    there_s = rank_s(table, rank, layer.tokens_R[rank] + less, layer.active_R[rank] + fewer)
                    if there_s < best.worst_s:
                        best = Change(slot, other, other_slot, expert, max(here_s, there_s))
    return best


@compiled
def best_copy(layer: Layer, table: CostTable, limits: Limits) -> Change:
    """The best replacement of a copy by a copy of another expert that relieves the slowest rank.

    Either an expert of the slowest rank gets a further copy elsewhere, or a copy on the slowest rank gives way.
    """
    slowest = int(np.argmax(layer.seconds_R))
    best = Change(-1, -1, -1, -1, layer.seconds_R[slowest] * (1.0 - LEAST_GAIN_FRAC))
    return _copy_away(layer, table, limits, slowest, _copy_elsewhere(layer, table, limits, slowest, best))


@compiled
def _copy_elsewhere(layer: Layer, table: CostTable, limits: Limits, slowest: int, best: Change) -> Change:
    first = slowest // limits.ranks_per_node * limits.ranks_per_node
    slots_per_rank = limits.slots_per_rank
    for own_slot in range(slowest * slots_per_rank, (slowest + 1) * slots_per_rank):
        new = layer.slot_S[own_slot]
        before, after = layer.load_E[new] / layer.copies_E[new], layer.load_E[new] / (layer.copies_E[new] + 1)
        copies = layer.holds_ER[new, slowest]
        tokens = layer.tokens_R[slowest] - copies * (before - after)
        active = layer.active_R[slowest] - copies * (active_of(before) - active_of(after))
        least_s = rank_s(table, slowest, tokens, active)
        for slot in range(first * slots_per_rank, (first + limits.ranks_per_node) * slots_per_rank):
            if least_s >= best.worst_s:
                break
            old, rank = layer.slot_S[slot], slot // slots_per_rank
            if (
                rank == slowest
                or layer.copies_E[old] < 2
                or layer.holds_ER[new, rank] >= limits.most_alike
                or new == old
            ):
                continue
            worst_s = _after_copy(layer, table, limits, slot, new, best.worst_s)
            if worst_s < best.worst_s:
                best = Change(slot, new, -1, -1, worst_s)
    return best


@compiled
def _copy_away(layer: Layer, table: CostTable, limits: Limits, slowest: int, best: Change) -> Change:
    for slot in range(slowest * limits.slots_per_rank, (slowest + 1) * limits.slots_per_rank):
        old = layer.slot_S[slot]
        if layer.copies_E[old] < 2:
            continue
        for new in range(len(layer.load_E)):
            near = layer.node_E[new] == layer.node_E[old] and new != old
            lighter = layer.load_E[new] * layer.copies_E[old] < layer.load_E[old] * (layer.copies_E[new] + 1)
            if near and lighter and layer.holds_ER[new, slowest] < limits.most_alike:
                worst_s = _after_copy(layer, table, limits, slot, new, best.worst_s)
                if worst_s < best.worst_s:
                    best = Change(slot, new, -1, -1, worst_s)
    return best


@compiled
def _after_copy(layer: Layer, table: CostTable, limits: Limits, slot: int, new: int, limit_s: float) -> float:
    """Time of the slowest rank that holds either expert, once ``slot`` holds ``new``; infinite if not below ``limit_s``."""
    old, place = layer.slot_S[slot], slot // limits.slots_per_rank
    old_before, old_after = layer.load_E[old] / layer.copies_E[old], layer.load_E[old] / (layer.copies_E[old] - 1)
    new_before, new_after = layer.load_E[new] / layer.copies_E[new], layer.load_E[new] / (layer.copies_E[new] + 1)
    old_active, old_active_after = active_of(old_before), active_of(old_after)
    new_active, new_active_after = active_of(new_before), active_of(new_after)
    worst_s = 0.0
    first = place // limits.ranks_per_node * limits.ranks_per_node
    for rank in range(first, first + limits.ranks_per_node):
        olds, news = layer.holds_ER[old, rank], layer.holds_ER[new, rank]
        if olds == 0 and news == 0 and rank != place:
            continue
        olds_after, news_after = (olds - 1, news + 1) if rank == place else (olds, news)
        tokens = (
            layer.tokens_R[rank]
            + olds_after * old_after
            - olds * old_before
            + news_after * new_after
            - news * new_before
        )
        active = layer.active_R[rank] + olds_after * old_active_after - olds * old_active
        active += news_after * new_active_after - news * new_active
        worst_s = max(worst_s, rank_s(table, rank, tokens, active))
        if worst_s >= limit_s:
            return np.inf
    return worst_s


@compiled
def apply_change(layer: Layer, table: CostTable, limits: Limits, change: Change) -> None:
    """Carries out a swap or a replacement."""
    old, new = layer.slot_S[change.slot], change.expert
    _put(layer, limits, change.slot, new)
    if change.other_slot >= 0:
        _put(layer, limits, change.other_slot, change.other_expert)
    for rank in range(len(layer.seconds_R)):
        if (
            layer.holds_ER[old, rank] > 0
            or layer.holds_ER[new, rank] > 0
            or rank == change.slot // limits.slots_per_rank
        ):
            _sum_up(layer, table, limits, rank)


@compiled
def _put(layer: Layer, limits: Limits, slot: int, expert: int) -> None:
    rank, old = slot // limits.slots_per_rank, layer.slot_S[slot]
    layer.copies_E[old] -= 1
    layer.holds_ER[old, rank] -= 1
    layer.copies_E[expert] += 1
    layer.holds_ER[expert, rank] += 1
    layer.slot_S[slot] = expert


@compiled
def _sum_up(layer: Layer, table: CostTable, limits: Limits, rank: int) -> None:
    tokens, active = 0.0, 0.0
    for slot in range(rank * limits.slots_per_rank, (rank + 1) * limits.slots_per_rank):
        expert = layer.slot_S[slot]
        each = layer.load_E[expert] / layer.copies_E[expert]
        tokens += each
        active += active_of(each)
    layer.tokens_R[rank], layer.active_R[rank] = tokens, active
    layer.seconds_R[rank] = rank_s(table, rank, tokens, active)


@compiled
def improve_layer(layer: Layer, table: CostTable, limits: Limits, target_s: float, most_changes: int) -> int:
    """Changes until the layer is at ``target_s``, or none helps (much), or there were ``most_changes``; returns how many.

    Swaps first: they disturb two ranks only. A copy is replaced where no swap helps.
    """
    throughput = (1.0 / table.slowness_R).sum()
    patience, earlier_s = max(8, len(layer.seconds_R) // 2), np.inf
    for count in range(most_changes):
        worst_s = layer.seconds_R.max()
        if count % patience == 0:
            if worst_s > earlier_s * (1.0 - EVEN_FRAC):
                return count
            earlier_s = worst_s
        even_s = (layer.seconds_R / table.slowness_R).sum() / throughput
        if worst_s <= max(target_s, even_s * (1.0 + EVEN_FRAC)):
            return count
        change = best_swap(layer, table, limits, False)
        if change.slot < 0:
            change = best_copy(layer, table, limits)
        if change.slot < 0:
            return count
        apply_change(layer, table, limits, change)
    return most_changes


@compiled
def repair_layers(
    load_LE: Floats,
    node_LE: Ints,
    current_LS: Ints,
    table: CostTable,
    limits: Limits,
    target_L: Floats,
    most_changes: int,
) -> tuple[Ints, Floats, Ints]:
    """Changes, fewest moves first, that bring each layer from where it is to its target or as near as they do.

    Returns (slot, expert, other slot, other expert, moves) of each change, -1 for none: shape (L, C, 5); the slowest rank's
    time before the changes and after each of them: (L, C + 1); how many changes: (L,).
    """
    num_layers = len(load_LE)
    changes_LC5 = np.full((num_layers, most_changes, 5), -1, dtype=np.int64)
    seconds_LC = np.zeros((num_layers, most_changes + 1))
    counts_L = np.zeros(num_layers, dtype=np.int64)
    for index in range(num_layers):
        layer = placed_layer(load_LE[index], node_LE[index], current_LS[index], table, limits)
        seconds_LC[index, 0] = layer.seconds_R.max()
        for count in range(most_changes):
            worst_s = layer.seconds_R.max()
            if worst_s <= target_L[index]:
                break
            swap, copy = best_swap(layer, table, limits, False), best_copy(layer, table, limits)
            swap_gain = (worst_s - max(swap.worst_s, target_L[index])) / 2 if swap.slot >= 0 else 0.0
            copy_gain = worst_s - max(copy.worst_s, target_L[index]) if copy.slot >= 0 else 0.0
            if max(swap_gain, copy_gain) <= 0.0:
                break
            change = copy if copy_gain >= swap_gain else swap
            apply_change(layer, table, limits, change)
            changes_LC5[index, count] = np.array(
                [change.slot, change.expert, change.other_slot, change.other_expert, 1 if change.other_slot < 0 else 2]
            )
            seconds_LC[index, count + 1] = layer.seconds_R.max()
            counts_L[index] = count + 1
    return changes_LC5, seconds_LC, counts_L
