"""Anneals a layer until no rank is slower than a target: swaps and copies at random, now and then for the worse, ever less.

Deterministic: the random numbers are its own. Copies of an expert stay apart, and experts in their nodes. Compiled loops; see
``layer_state``. Letters: E experts, S slots, R ranks.
"""

from __future__ import annotations

import math

import numpy as np

from poise.plan.changes import Change, apply_change
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Layer, Limits, placed_layer, rank_s

TRIES = 8
STEPS = 30_000
"""Of each try: 15 ms with 16 ranks. More tries find more than longer ones."""
HOT, COLD = 0.05, 0.001
"""Temperature of the first and the last step: how much of the target a step may add to what ranks are over it, about."""
SWAPS_FRAC = 0.6
LARGEST = 2**31 - 1


@compiled
def anneal(
    load_E: Floats, node_E: Ints, slot_S: Ints, table: CostTable, limits: Limits, target_s: float
) -> tuple[Ints, bool, int]:
    """(slot_to_expert_S within the target, whether it was found, steps taken), from a placement whose copies lie apart."""
    steps = 0
    for seed in range(1, TRIES + 1):
        layer = placed_layer(load_E, node_E, slot_S, table, limits)
        steps += _try(layer, table, limits, target_s, seed)
        if layer.seconds_R.max() <= target_s:
            return layer.slot_S, True, steps
    return slot_S, False, steps


@compiled
def _try(layer: Layer, table: CostTable, limits: Limits, target_s: float, seed: int) -> int:
    """Changes until the layer is within the target or cold; returns the steps. Half of them begin at the slowest rank."""
    slots, cooling, temperature = limits.slots_per_rank, (COLD / HOT) ** (1.0 / STEPS), HOT
    node_slots, state = limits.ranks_per_node * slots, seed
    slowest = int(np.argmax(layer.seconds_R))
    for step in range(STEPS):
        if layer.seconds_R[slowest] <= target_s:
            return step
        temperature *= cooling
        where = _next(state)
        at = _next(where)
        other = _next(at)
        kind = _next(other)
        state = _next(kind)
        allowed = -temperature * math.log(state / LARGEST)
        slot = slowest * slots + at % slots if where % 2 else at % len(layer.slot_S)
        if kind < SWAPS_FRAC * LARGEST:
            other_slot = slot // node_slots * node_slots + other % node_slots
            changed = _swap(layer, table, limits, slot, other_slot, target_s, allowed)
        else:
            some = other // 2
            new = layer.slot_S[slowest * slots + some % slots] if other % 2 else some % len(layer.load_E)
            changed = _copy(layer, table, limits, slot, new, target_s, allowed)
        if changed:
            slowest = int(np.argmax(layer.seconds_R))
    return STEPS


@compiled
def _swap(
    layer: Layer, table: CostTable, limits: Limits, slot: int, other_slot: int, target_s: float, allowed: float
) -> bool:
    """Swaps two slots where that adds no more than ``allowed`` to what ranks are over the target; says whether it did."""
    rank, there = slot // limits.slots_per_rank, other_slot // limits.slots_per_rank
    old, other = layer.slot_S[slot], layer.slot_S[other_slot]
    if rank == there or max(layer.holds_ER[old, there], layer.holds_ER[other, rank]) >= limits.most_alike:
        return False
    more, further = layer.each_E[other] - layer.each_E[old], layer.share_E[other] - layer.share_E[old]
    here_s = rank_s(table, rank, layer.tokens_R[rank] + more, layer.active_R[rank] + further)
    there_s = rank_s(table, there, layer.tokens_R[there] - more, layer.active_R[there] - further)
    before = _over(layer.seconds_R[rank], target_s) + _over(layer.seconds_R[there], target_s)
    if _over(here_s, target_s) + _over(there_s, target_s) - before > allowed:
        return False
    apply_change(layer, table, limits, Change(slot, other, other_slot, old, 0.0))
    return True


@compiled
def _copy(layer: Layer, table: CostTable, limits: Limits, slot: int, new: int, target_s: float, allowed: float) -> bool:
    """Replaces a copy by one of another expert; else as ``_swap``."""
    rank, old = slot // limits.slots_per_rank, layer.slot_S[slot]
    if layer.copies_E[old] < 2 or layer.node_E[new] != layer.node_E[old]:
        return False
    if new == old or layer.holds_ER[new, rank] >= limits.most_alike:
        return False
    before = _all_over(layer, target_s)
    apply_change(layer, table, limits, Change(slot, new, -1, -1, 0.0))
    if _all_over(layer, target_s) - before <= allowed:
        return True
    apply_change(layer, table, limits, Change(slot, old, -1, -1, 0.0))
    return False


@compiled
def _over(seconds: float, target_s: float) -> float:
    return max(0.0, seconds / target_s - 1.0)


@compiled
def _all_over(layer: Layer, target_s: float) -> float:
    total = 0.0
    for seconds in layer.seconds_R:
        total += _over(seconds, target_s)
    return total


@compiled
def _next(state: int) -> int:
    """The next random number from 1 to 2^31 - 2 (the generator of Park and Miller)."""
    return state * 48271 % LARGEST
