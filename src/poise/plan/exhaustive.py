"""The fastest of all placements of a small node in which copies of an expert lie apart, its ranks being alike.

Every way to hand out copies is taken in turn. Ranks are filled one after the other, the first slot of each with the heaviest
copy that is left and the others with lighter ones, so that no placement comes up again with ranks or slots in another order.
Compiled loops; see ``layer_state``. Letters: E experts, S slots, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Limits, rank_s

LEAST_GAIN_FRAC = 1e-9
"""Smaller gains are rounding."""


class Fastest(NamedTuple):
    """``slot_S``: the expert in each slot, -1 where none was found within ``seconds``. ``steps``: how many are left; at 0 not
    all placements were seen."""

    slot_S: Ints
    seconds: float
    steps: int


class Filling(NamedTuple):
    """Slots filled so far. Experts in descending weight of a copy; ``left_E``: copies that have no slot yet.

    ``tokens_S``, ``active_S``: of the slots of the rank up to this one.
    """

    each_E: Floats
    share_E: Floats
    left_E: Ints
    slot_S: Ints
    tokens_S: Floats
    active_S: Floats
    seconds_R: Floats


@compiled
def fastest_apart(load_E: Floats, table: CostTable, limits: Limits, limit_s: float, steps: int) -> Fastest:
    """The fastest placement of the experts in one node, within ``limit_s``; after so many ``steps`` the fastest until then."""
    slots, most = limits.ranks_per_node * limits.slots_per_rank, limits.ranks_per_node * limits.most_alike
    heaviest_E = np.argsort(-load_E, kind="mergesort")
    copies_E, further_E = np.empty(len(load_E), dtype=np.int64), np.zeros(len(load_E), dtype=np.int64)
    _hand_out(further_E, 0, slots - len(load_E), most - 1)
    best = Fastest(np.full(slots, -1, dtype=np.int64), limit_s, steps)
    while best.steps > 0:
        copies_E[heaviest_E] = 1 + further_E
        best = _fastest_with(load_E, copies_E, table, limits, best)
        if not _hand_out_next(further_E, most - 1):
            break
    return best


@compiled
def _hand_out(further_E: Ints, first: int, count: int, most: int) -> None:
    """``count`` copies to the experts from ``first`` on, each as many as it may have."""
    for expert in range(first, len(further_E)):
        further_E[expert] = min(most, count)
        count -= further_E[expert]


@compiled
def _hand_out_next(further_E: Ints, most: int) -> bool:
    """The next way to hand out as many copies; False after the last."""
    after = 0
    for expert in range(len(further_E) - 1, -1, -1):
        if further_E[expert] > 0 and after < (len(further_E) - 1 - expert) * most:
            further_E[expert] -= 1
            _hand_out(further_E, expert + 1, after + 1, most)
            return True
        after += further_E[expert]
    return False


@compiled
def _fastest_with(load_E: Floats, copies_E: Ints, table: CostTable, limits: Limits, best: Fastest) -> Fastest:
    """``best``, or a placement with these copies that is faster."""
    order_E = np.argsort(-load_E / copies_E, kind="mergesort")
    each_E, num_slots = (load_E / copies_E)[order_E], len(best.slot_S)
    filling = Filling(
        each_E,
        -np.expm1(-each_E),
        copies_E[order_E],
        np.full(num_slots, -1, dtype=np.int64),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(limits.ranks_per_node),
    )
    best_S, limit_s, steps = best.slot_S, best.seconds, best.steps - len(load_E)
    slot, expert = 0, 0
    while slot >= 0 and steps > 0:
        expert, tried = _fitting(filling, table, limits, slot, expert, limit_s)
        steps -= tried
        if expert < len(load_E):
            _put(filling, slot, expert)
            if slot + 1 < num_slots:
                slot += 1
                expert = _first_of(filling, limits, slot)
                continue
            best_S, limit_s = order_E[filling.slot_S], filling.seconds_R.max() * (1.0 - LEAST_GAIN_FRAC)
            last = (int(np.argmax(filling.seconds_R > limit_s)) + 1) * limits.slots_per_rank - 1
            while slot > last:  # back to the rank that is too slow now
                _take(filling, slot)
                slot -= 1
        else:
            slot -= 1
        if slot >= 0:
            expert = _take(filling, slot) + 1 if slot % limits.slots_per_rank > 0 else len(load_E)
    return Fastest(best_S, limit_s, max(steps, 0))


@compiled
def _first_of(filling: Filling, limits: Limits, slot: int) -> int:
    """The first expert to try in a slot: none before that of the slot before, and ranks that begin alike in order."""
    slots = limits.slots_per_rank
    place = slot % slots
    if place == 0:
        return 0
    before = filling.slot_S[slot - 1]
    is_full = place >= limits.most_alike and filling.slot_S[slot - limits.most_alike] == before
    expert = int(before + 1) if is_full else int(before)
    if place == 1 and slot > slots and filling.slot_S[slot - 1 - slots] == before:
        expert = max(expert, int(filling.slot_S[slot - slots]))
    return expert


@compiled
def _fitting(
    filling: Filling, table: CostTable, limits: Limits, slot: int, first: int, limit_s: float
) -> tuple[int, int]:
    """(the first expert from ``first`` on that a slot can have, or the number of experts; how many were tried)."""
    rank, place = slot // limits.slots_per_rank, slot % limits.slots_per_rank
    experts, tried = len(filling.left_E), 0
    if place == 0 and filling.left_E.max() > (limits.ranks_per_node - rank) * limits.most_alike:
        return experts, 1
    tokens = filling.tokens_S[slot - 1] if place > 0 else 0.0
    active = filling.active_S[slot - 1] if place > 0 else 0.0
    for expert in range(first, experts):
        if filling.left_E[expert] == 0:
            continue
        tried += 1
        filling.tokens_S[slot] = tokens + filling.each_E[expert]
        filling.active_S[slot] = active + filling.share_E[expert]
        if place < limits.slots_per_rank - 1:
            return expert, tried
        filling.seconds_R[rank] = rank_s(table, rank, filling.tokens_S[slot], filling.active_S[slot])
        if filling.seconds_R[rank] <= limit_s:
            return expert, tried
        if place == 0:
            break
    return experts, max(tried, 1)


@compiled
def _put(filling: Filling, slot: int, expert: int) -> None:
    filling.slot_S[slot] = expert
    filling.left_E[expert] -= 1


@compiled
def _take(filling: Filling, slot: int) -> int:
    expert = int(filling.slot_S[slot])
    filling.left_E[expert] += 1
    return expert
