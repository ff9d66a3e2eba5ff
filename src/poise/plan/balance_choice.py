"""Which replicas come for one step: ours, by what they save of the links and of the slowest rank.

1. Locality: the heaviest experts get copies where most of their tokens are born, as far as that saves more on the links than
   one more active expert costs. Tokens are spread over the copies.
2. Balance: a rank that is late hands tokens of its heaviest expert to the one that can take most, in free slots.
3. Trials (``balance_trials``), as many as there is time for.

Replicas are limited by slots and windows, not by a count of rounds. Compiled loops on ``balance_state``.
Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from poise.plan.balance_spread import LATE_FRAC, fill, spread
from poise.plan.balance_state import (
    NONE,
    Counts,
    Group,
    Step,
    add_replica,
    copy_step,
    drop_replica,
    empty_step,
    holds,
    level_s,
    set_quota,
    slowest_s,
)
from poise.plan.balance_trials import source_of, take_born, try_fewer, try_others, try_relief
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Ints

HAND_OVER_WORK = 8
"""Setting so many copies takes about as long as one hand-over."""
LINKS_FRAC = 0.4
"""Of a token's time in its expert, from which on its way decides which replicas come first."""
LEAST_SAVED_FRAC = 0.005
"""Of the time: what a replica must save on its rank's link beyond an active expert, to come for that alone."""
LATE_ACTIVE = 0.5
"""So many active experts may a rank be late by, if that is more than ``LATE_FRAC``."""


@compiled
def choose(step: Step, group: Group, counts_RE: Counts) -> None:
    """Adds replicas to ``step`` and spreads all tokens."""
    links_first = _links_weigh(step)
    work = _in_order(step, group, counts_RE, links_first)
    if work < group.most_work and _is_uneven(step):
        other = empty_step(len(step.copy_C), len(step.expert_E), len(step.rank_R))
        copy_step(step, other)
        for slot in range(len(group.slot_to_expert_S), len(other.copy_C)):
            if other.copy_C[slot]["expert"] != NONE:
                drop_replica(other, slot)
        work += _in_order(other, group, counts_RE, not links_first)
        if slowest_s(other) < slowest_s(step):
            copy_step(other, step)
        work = try_relief(step, group, counts_RE, work)
    work = try_others(step, group, counts_RE, work)
    try_fewer(step, group, work)
    for slot in range(len(group.slot_to_expert_S), len(step.copy_C)):
        if step.copy_C[slot]["expert"] != NONE and step.copy_C[slot]["quota"] < 1.0:
            drop_replica(step, slot)


@compiled
def _goal_and_latest(step: Step) -> tuple[float, int]:
    """As late as a rank may be: to relieve it of less costs others more, an active expert for each replica. And the latest."""
    seconds = weights = active_s = 0.0
    late = 0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        seconds += its["weight"] * its["seconds"]
        weights += its["weight"]
        active_s += its["active_s"] + 2.0 * its["copy_s"]
        if its["seconds"] > step.rank_R[late]["seconds"]:
            late = rank
    level = seconds / weights
    return level + max(LATE_FRAC * level, LATE_ACTIVE * active_s / len(step.rank_R)), late


@compiled
def _is_uneven(step: Step) -> bool:
    goal_s, late = _goal_and_latest(step)
    return _is_late(step.rank_R[late], goal_s)


@compiled
def _is_late(rank: Any, goal_s: float) -> bool:
    """By as many tokens as another rank may be given of an expert."""
    return bool(rank["seconds"] > goal_s + rank["least"] * rank["token_s"])


@compiled
def _links_weigh(step: Step) -> bool:
    """Whether a token's way costs about as much as its expert."""
    way_s = token_s = 0.0
    for rank in range(len(step.rank_R)):
        way_s += step.rank_R[rank]["in_s"]
        token_s += step.rank_R[rank]["token_s"]
    return way_s > LINKS_FRAC * token_s


@compiled
def _in_order(step: Step, group: Group, counts_RE: Counts, links_first: bool) -> int:
    """What comes first has the slots and windows. Returns the work."""
    if links_first:
        _save_links(step, group, counts_RE)
        work = spread(step) + _relieve(step, group, counts_RE)
    else:
        work = _relieve(step, group, counts_RE)
        _save_links(step, group, counts_RE)
    return work + spread(step)


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
    least, free = np.inf, 0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        least = min(least, its["active_s"] / its["out_s"])
        free += its["slots"]
    open_E, count = np.empty(len(step.expert_E), dtype=np.int64), 0
    held_R, least_s = np.zeros(len(step.rank_R), dtype=np.bool_), LEAST_SAVED_FRAC * level_s(step)
    for expert in range(len(step.expert_E)):
        if step.expert_E[expert]["most"] > least:
            open_E[count] = expert
            count += 1
    while free > 0 and count > 0:
        heaviest = 0
        for place in range(1, count):
            if step.expert_E[open_E[place]]["total"] > step.expert_E[open_E[heaviest]]["total"]:
                heaviest = place
        expert = open_E[heaviest]
        open_E[heaviest] = open_E[count - 1]
        count -= 1
        source = source_of(step, expert)
        _mark_holders(step, expert, held_R)
        while source != NONE and free > 0:
            best = _where_most_is_saved(step, counts_RE, expert, held_R, least_s + step.rank_R[source]["copy_s"])
            if best == NONE:
                break
            held_R[best] = True
            take_born(step, add_replica(step, group, counts_RE, expert, source, best))
            free -= 1
            source = source_of(step, expert)


@compiled
def _mark_holders(step: Step, expert: int, held_R: npt.NDArray[np.bool_]) -> None:
    held_R[:] = False
    place = step.expert_E[expert]["first"]
    while place != NONE:
        held_R[step.copy_C[place]["rank"]] = True
        place = step.copy_C[place]["next"]


@compiled
def _where_most_is_saved(
    step: Step, counts_RE: Counts, expert: int, held_R: npt.NDArray[np.bool_], least_s: float
) -> int:
    best, most_s = NONE, least_s
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        saved_s = its["out_s"] * counts_RE[rank, expert] - its["active_s"] - its["copy_s"]
        if saved_s > most_s and its["slots"] > 0 and not held_R[rank]:
            best, most_s = rank, saved_s
    return best


@compiled
def _relieve(step: Step, group: Group, counts_RE: Counts) -> int:
    """Late ranks hand tokens over, the latest first, until all finish by the goal or none can any more. Returns the work."""
    num_ranks, work = len(step.rank_R), 0
    spent_R = np.zeros(num_ranks, dtype=np.bool_)
    for _ in range(num_ranks * (1 + group.replica_slots)):
        goal_s, late = _goal_and_latest(step)
        if not _is_late(step.rank_R[late], goal_s):
            break
        giver = late if not spent_R[late] else _partner(step, group, late, spent_R, goal_s)
        if giver == NONE:
            break
        work += HAND_OVER_WORK
        copy, rank, tokens = _best_hand_over(step, group, counts_RE, giver, goal_s)
        if copy == NONE:
            spent_R[giver] = True
            continue
        new = add_replica(step, group, counts_RE, step.copy_C[copy]["expert"], giver, rank)
        set_quota(step, copy, step.copy_C[copy]["quota"] - tokens)
        set_quota(step, new, tokens)
        if giver != late:
            work += _refill(step, group, giver)
    return work


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
def _refill(step: Step, group: Group, rank: int) -> int:
    """Spreads what a rank shares with others anew. Returns the work."""
    work = 0
    for place in range(_places(step, group)):
        expert = step.copy_C[_copy_at(step, group, rank, place)]["expert"]
        if expert != NONE and step.expert_E[expert]["copies"] > 1:
            fill(step, expert, np.inf)
            work += step.expert_E[expert]["copies"]
    return work


@compiled
def _best_hand_over(step: Step, group: Group, counts_RE: Counts, giver: int, goal_s: float) -> tuple[int, int, float]:
    """The home copy of ``giver`` and the rank that take most time off it, counting what stays off the links; -1: none."""
    per_rank = len(group.slot_to_expert_S) // len(step.rank_R)
    best, taker, moved, most_s = NONE, NONE, 0.0, 0.0
    mine = step.rank_R[giver]
    if mine["gives"] == 0:
        return best, taker, moved
    token_s, in_s = mine["token_s"], mine["in_s"]
    excess = (mine["seconds"] + mine["copy_s"] - goal_s) / (token_s + 0.5 * in_s)
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        if its["slots"] == 0 or rank == giver or its["seconds"] >= goal_s:
            continue
        for place in range(giver * per_rank, (giver + 1) * per_rank):
            copy = step.copy_C[place]
            quota, expert = copy["quota"], copy["expert"]
            if expert == NONE or quota * (token_s + in_s) - mine["copy_s"] <= most_s:
                continue
            local = min(float(counts_RE[rank, expert]), quota)
            room = goal_s - its["seconds"] - its["active_s"] - its["copy_s"] + its["out_s"] * local
            tokens = min(quota, excess, room / its["token_s"])
            if its["gives"] > 0:  # it passes on what lies too much on it then
                tokens = max(tokens, min(quota, excess / mine["gives"]))
            if quota - tokens < mine["least"]:
                tokens = quota
            if tokens < min(its["least"], quota) or tokens < 1.0:
                continue
            saved_s = tokens * token_s + in_s * min(local, tokens) - mine["copy_s"]
            if saved_s > most_s and not holds(step, expert, rank):
                best, taker, moved, most_s = place, rank, tokens, saved_s
    return best, taker, moved
