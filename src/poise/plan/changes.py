"""Changes of a layer's placement that relieve its slowest rank: swaps of two slots, or else copies that replace others.

Compiled loops; see ``layer_state``. Letters: E experts, S slots, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from poise.plan.compiled import compiled
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, rank_s

GOOD_FRAC = 0.4
"""A swap is taken without a look at further ranks when it closes this share of the gap between two ranks."""
TRIED_RANKS = 6
"""The fastest ranks have most room: further ones are tried only where none of these has a slot to swap."""
LEAST_GAIN_FRAC = 1e-9
"""Smaller gains are rounding."""


class Change(NamedTuple):
    """``expert`` goes into ``slot``, and ``other_expert`` into ``other_slot`` if that is not -1. ``worst_s``: the slowest of
    the ranks that get more to do, after it."""

    slot: int
    expert: int
    other_slot: int
    other_expert: int
    worst_s: float


@compiled
def best_swap(layer: Layer, table: CostTable, limits: Limits) -> Change:
    """The swap of a slot of the slowest rank for one of another that leaves the slower of the two fastest.

    Ranks are tried from the fastest on; a good swap ends the search, any swap after ``TRIED_RANKS`` of them.
    """
    slowest = int(np.argmax(layer.seconds_R))
    worst_s = layer.seconds_R[slowest]
    best = Change(-1, -1, -1, -1, worst_s * (1.0 - LEAST_GAIN_FRAC))
    first = slowest // limits.ranks_per_node * limits.ranks_per_node
    left_R = layer.seconds_R[first : first + limits.ranks_per_node].copy()
    tokens_here, active_here = layer.tokens_R[slowest], layer.active_R[slowest]
    for tried in range(limits.ranks_per_node):
        rank = first + int(np.argmin(left_R))
        left_R[rank - first] = np.inf
        gap_s = worst_s - layer.seconds_R[rank]
        if rank == slowest or gap_s <= 0.0 or best.worst_s < worst_s - GOOD_FRAC * gap_s:
            break
        if tried >= TRIED_RANKS and best.slot >= 0:
            break
        for slot in range(slowest * limits.slots_per_rank, (slowest + 1) * limits.slots_per_rank):
            expert = layer.slot_S[slot]
            if layer.holds_ER[expert, rank] >= limits.most_alike:
                continue
            for other_slot in range(rank * limits.slots_per_rank, (rank + 1) * limits.slots_per_rank):
                other = layer.slot_S[other_slot]
                less = layer.each_E[expert] - layer.each_E[other]
                if less <= 0.0 or layer.holds_ER[other, slowest] >= limits.most_alike:
                    continue
                fewer = layer.share_E[expert] - layer.share_E[other]
                here_s = rank_s(table, slowest, tokens_here - less, active_here - fewer)
                if here_s < best.worst_s:
                    there_s = rank_s(table, rank, layer.tokens_R[rank] + less, layer.active_R[rank] + fewer)
                    if there_s < best.worst_s:
                        best = Change(slot, other, other_slot, expert, max(here_s, there_s))
    return best


@compiled
def best_copy(layer: Layer, table: CostTable, limits: Limits, limit_s: float) -> Change:
    """The best replacement of a copy by a copy of another expert that brings the slowest rank, and those that then get more to
    do, below ``limit_s``; slot -1 for none.

    Either an expert of the slowest rank gets a further copy elsewhere, or a copy on the slowest rank gives way.
    """
    slowest = int(np.argmax(layer.seconds_R))
    best = Change(-1, -1, -1, -1, min(limit_s, layer.seconds_R[slowest] * (1.0 - LEAST_GAIN_FRAC)))
    return _copy_away(layer, table, limits, slowest, _copy_elsewhere(layer, table, limits, slowest, best))


@compiled
def _copy_elsewhere(layer: Layer, table: CostTable, limits: Limits, slowest: int, best: Change) -> Change:
    first = slowest // limits.ranks_per_node * limits.ranks_per_node
    slots_per_rank = limits.slots_per_rank
    for own_slot in range(slowest * slots_per_rank, (slowest + 1) * slots_per_rank):
        new = layer.slot_S[own_slot]
        after = layer.load_E[new] / (layer.copies_E[new] + 1)
        share = active_of(after)
        copies = layer.holds_ER[new, slowest]
        tokens = layer.tokens_R[slowest] - copies * (layer.each_E[new] - after)
        here_s = rank_s(table, slowest, tokens, layer.active_R[slowest] - copies * (layer.share_E[new] - share))
        for slot in range(first * slots_per_rank, (first + limits.ranks_per_node) * slots_per_rank):
            if here_s >= best.worst_s:
                break
            old, rank = layer.slot_S[slot], slot // slots_per_rank
            if (
                layer.copies_E[old] < 2
                or rank == slowest
                or new == old
                or layer.holds_ER[new, rank] >= limits.most_alike
            ):
                continue
            if layer.seconds_R[rank] >= best.worst_s and after >= layer.each_E[old]:
                continue
            worst_s = after_copy(layer, table, limits, slot, new, after, share, best.worst_s)
            if worst_s < best.worst_s:
                best = Change(slot, new, -1, -1, max(worst_s, here_s))
    return best


@compiled
def _copy_away(layer: Layer, table: CostTable, limits: Limits, slowest: int, best: Change) -> Change:
    """The slowest rank is relieved most by the expert whose copies would be lightest."""
    for slot in range(slowest * limits.slots_per_rank, (slowest + 1) * limits.slots_per_rank):
        old = layer.slot_S[slot]
        if layer.copies_E[old] < 2:
            continue
        new, lightest = -1, layer.each_E[old]
        for expert in range(len(layer.load_E)):
            tokens = layer.load_E[expert] / (layer.copies_E[expert] + 1)
            near = layer.node_E[expert] == layer.node_E[old] and expert != old
            if near and tokens < lightest and layer.holds_ER[expert, slowest] < limits.most_alike:
                new, lightest = expert, tokens
        if new >= 0:
            worst_s = after_copy(layer, table, limits, slot, new, lightest, active_of(lightest), best.worst_s)
            if worst_s < best.worst_s:
                best = Change(slot, new, -1, -1, worst_s)
    return best


@compiled
def after_copy(
    layer: Layer,
    table: CostTable,
    limits: Limits,
    slot: int,
    new: int,
    new_after: float,
    new_share: float,
    limit_s: float,
) -> float:
    """Time of the slowest rank that gets more to do once ``slot`` holds ``new``, or gets it; infinite from ``limit_s`` on.

    ``new_after``, ``new_share``: tokens and share of each copy of ``new`` then. The ranks are that of the slot and those that
    keep copies of the expert which leaves it.
    """
    old, place = layer.slot_S[slot], slot // limits.slots_per_rank
    olds, news = layer.holds_ER[old, place], layer.holds_ER[new, place]
    tokens = layer.tokens_R[place] - layer.each_E[old] + new_after + news * (new_after - layer.each_E[new])
    active = layer.active_R[place] - layer.share_E[old] + new_share + news * (new_share - layer.share_E[new])
    if olds == 1:  # the usual case, in which most changes are given up
        worst_s = rank_s(table, place, tokens, active)
        if worst_s >= limit_s:
            return np.inf
    else:
        worst_s = 0.0
    old_after = layer.load_E[old] / (layer.copies_E[old] - 1)
    old_share = active_of(old_after)
    if olds > 1:
        tokens += (olds - 1) * (old_after - layer.each_E[old])
        active += (olds - 1) * (old_share - layer.share_E[old])
        worst_s = rank_s(table, place, tokens, active)
    first = place // limits.ranks_per_node * limits.ranks_per_node
    for rank in range(first, first + limits.ranks_per_node):
        olds = layer.holds_ER[old, rank]
        if olds == 0 or rank == place:
            continue
        news = layer.holds_ER[new, rank]
        tokens = layer.tokens_R[rank] + olds * (old_after - layer.each_E[old])
        active = layer.active_R[rank] + olds * (old_share - layer.share_E[old])
        if news > 0:
            tokens += news * (new_after - layer.each_E[new])
            active += news * (new_share - layer.share_E[new])
        worst_s = max(worst_s, rank_s(table, rank, tokens, active))
        if worst_s >= limit_s:
            return np.inf
    return worst_s if worst_s < limit_s else np.inf


@compiled
def apply_change(layer: Layer, table: CostTable, limits: Limits, change: Change) -> None:
    """Carries out a swap or a replacement."""
    old, new = layer.slot_S[change.slot], change.expert
    _put(layer, limits, change.slot, new)
    if change.other_slot >= 0:
        _put(layer, limits, change.other_slot, change.other_expert)
        _sum_up(layer, table, limits, change.slot // limits.slots_per_rank)
        _sum_up(layer, table, limits, change.other_slot // limits.slots_per_rank)
        return
    for expert in (old, new):
        layer.each_E[expert] = layer.load_E[expert] / layer.copies_E[expert]
        layer.share_E[expert] = active_of(layer.each_E[expert])
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
        tokens += layer.each_E[expert]
        active += layer.share_E[expert]
    layer.tokens_R[rank], layer.active_R[rank] = tokens, active
    layer.seconds_R[rank] = rank_s(table, rank, tokens, active)
