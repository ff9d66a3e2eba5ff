"""Which replicas come for one step: ours, by what they save of the links and of the slowest rank.

1. Locality: the heaviest experts get copies where most of their tokens are born, as far as that saves more on the links than
   one more active expert costs. Tokens are spread over the copies.
2. Balance: a rank that is late hands tokens of its heaviest expert to the one that can take most, in free slots.
3. Trials (``balance_trials``), as many as there is time for.

Replicas are limited by slots and windows, not by a count of rounds. Compiled loops on ``balance_state``.
Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.balance_spread import CLOSE_FRAC, LEAST_TOKENS, ROUNDS, fill, spread
from poise.plan.balance_state import (
    NONE,
    Counts,
    Group,
    Step,
    add_replica,
    drop_replica,
    holds,
    latest,
    level_s,
    set_quota,
)
from poise.plan.balance_trials import source_of, take_born, try_fewer, try_others
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Ints


@compiled
def choose(step: Step, group: Group, counts_RE: Counts) -> None:
    """Adds replicas to ``step`` and spreads all tokens."""
    _save_links(step, group, counts_RE)
    spread(step, ROUNDS)
    _relieve(step, group, counts_RE)
    spread(step, ROUNDS)
    try_others(step, group, counts_RE)
    try_fewer(step)
    for slot in range(len(group.slot_to_expert_S), len(step.copy_C)):
        if step.copy_C[slot]["expert"] != NONE and step.copy_C[slot]["quota"] < LEAST_TOKENS:
            drop_replica(step, slot)


@compiled
def replicas_of(step: Step, group: Group) -> Ints:
    """Expert, source and target rank of each."""
    num_slots, count = len(group.slot_to_expert_S), 0
    replica_N3 = np.empty((len(step.copy_C) - num_slots, 3), dtype=np.int64)
    for slot in range(num_slots, len(step.copy_C)):
        copy = step.copy_C[slot]
        if copy["expert"] != NONE:
            replica_N3[count, 0], replica_N3[count, 1], replica_N3[count, 2] = (
                copy["expert"],
                copy["source"],
                copy["rank"],
            )
            count += 1
    return replica_N3[:count]


@compiled
def _save_links(step: Step, group: Group, counts_RE: Counts) -> None:
    """The heaviest expert first, to the ranks where it saves most."""
    num_experts = counts_RE.shape[1]
    least, free = np.inf, 0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        least = min(least, its["active_s"] / its["out_s"])
        free += its["slots"]
    total_E = np.empty(num_experts)
    for expert in range(num_experts):
        total_E[expert] = -step.expert_E[expert]["total"]
    order_E = np.argsort(total_E)
    for place in range(num_experts):
        expert = order_E[place]
        if free == 0 or -total_E[expert] <= least:
            break
        source = source_of(step, expert)
        while source != NONE and free > 0:
            best = _where_most_is_saved(step, counts_RE, expert)
            if best == NONE:
                break
            take_born(step, add_replica(step, group, counts_RE, expert, source, best))
            free -= 1
            source = source_of(step, expert)


@compiled
def _where_most_is_saved(step: Step, counts_RE: Counts, expert: int) -> int:
    best, most_s = NONE, 0.0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        saved_s = its["out_s"] * counts_RE[rank, expert] - its["active_s"]
        if saved_s > most_s and its["slots"] > 0 and not holds(step, expert, rank):
            best, most_s = rank, saved_s
    return best


@compiled
def _relieve(step: Step, group: Group, counts_RE: Counts) -> None:
    """Late ranks hand tokens over, the latest first, until all finish by the level or none can any more."""
    num_ranks = len(step.rank_R)
    spent_R = np.zeros(num_ranks, dtype=np.bool_)
    for _ in range(num_ranks * (1 + group.replica_slots)):
        goal_s = (1.0 + CLOSE_FRAC) * level_s(step)
        late = latest(step)
        if step.rank_R[late]["seconds"] <= goal_s:
            return
        giver = late if not spent_R[late] else _partner(step, group, late, spent_R, goal_s)
        if giver == NONE:
            return
        copy, rank, tokens = _best_hand_over(step, group, counts_RE, giver, goal_s)
        if copy == NONE:
            spent_R[giver] = True
            continue
        new = add_replica(step, group, counts_RE, step.copy_C[copy]["expert"], giver, rank)
        set_quota(step, copy, step.copy_C[copy]["quota"] - tokens)
        set_quota(step, new, tokens)
        if giver != late:
            _refill(step, group, giver)


@compiled
def _places(step: Step, group: Group) -> int:
    """Copies that a rank can hold."""
    return len(group.slot_to_expert_S) // len(step.rank_R) + group.replica_slots


@compiled
def _copy_at(step: Step, group: Group, rank: int, place: int) -> int:
    """The rank's ``place``-th copy: home slots, then replica slots."""
    num_slots = len(group.slot_to_expert_S)
    per_rank = num_slots // len(step.rank_R)
    if place < per_rank:
        return rank * per_rank + place
    return num_slots + rank * group.replica_slots + place - per_rank


@compiled
def _partner(step: Step, group: Group, late: int, spent_R: npt.NDArray[np.bool_], goal_s: float) -> int:
    """The latest rank that shares an expert with ``late`` and may still hand over."""
    best, most_s = NONE, goal_s
    for place in range(_places(step, group)):
        copy = step.copy_C[_copy_at(step, group, late, place)]
        if copy["expert"] == NONE or copy["quota"] <= 0.0:
            continue
        other = step.expert_E[copy["expert"]]["first"]
        while other != NONE:
            rank = step.copy_C[other]["rank"]
            if not spent_R[rank] and step.rank_R[rank]["seconds"] > most_s:
                best, most_s = rank, step.rank_R[rank]["seconds"]
            other = step.copy_C[other]["next"]
    return best


@compiled
def _refill(step: Step, group: Group, rank: int) -> None:
    for place in range(_places(step, group)):
        expert = step.copy_C[_copy_at(step, group, rank, place)]["expert"]
        if expert != NONE and step.expert_E[expert]["copies"] > 1:
            fill(step, expert, np.inf)


@compiled
def _best_hand_over(step: Step, group: Group, counts_RE: Counts, giver: int, goal_s: float) -> tuple[int, int, float]:
    """The home copy of ``giver`` and the rank that take most time off it, counting what stays off the links; -1: none."""
    per_rank = len(group.slot_to_expert_S) // len(step.rank_R)
    best, taker, moved, most_s = NONE, NONE, 0.0, 0.0
    mine = step.rank_R[giver]
    if mine["gives"] == 0:
        return best, taker, moved
    token_s, in_s = mine["token_s"], mine["in_s"]
    excess = (mine["seconds"] - goal_s) / (token_s + 0.5 * in_s)
    for copy in range(giver * per_rank, (giver + 1) * per_rank):
        quota, expert = step.copy_C[copy]["quota"], step.copy_C[copy]["expert"]
        if expert == NONE or quota * (token_s + in_s) <= most_s:
            continue
        for rank in range(len(step.rank_R)):
            its = step.rank_R[rank]
            if its["slots"] == 0 or rank == giver:
                continue
            local = min(float(counts_RE[rank, expert]), quota)
            room = goal_s - its["seconds"] - its["active_s"] + its["out_s"] * local
            tokens = min(quota, excess, room / its["token_s"])
            if tokens < LEAST_TOKENS:
                continue
            saved_s = tokens * token_s + in_s * min(local, tokens)
            if saved_s > most_s and not holds(step, expert, rank):
                best, taker, moved, most_s = copy, rank, tokens, saved_s
    return best, taker, moved
