"""Trials, one at a time: a replica more, another in its place, a copy that computes nothing; kept if the slowest rank gains.

This finds what choosing one replica after the other misses, where there are few ranks. Work is limited, so that large groups
are planned as fast: they hardly need it. Compiled loops on ``balance_state``. Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.balance_spread import CLOSE_FRAC, LATE_FRAC, fill, spread
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
    latest,
    level_s,
    set_quota,
    slowest_s,
)
from poise.plan.compiled import borrowing, compiled

SMALL = 512
"""Pairs of a copy and an expert, up to which all are tried."""


@borrowing
def is_small(step: Step) -> bool:
    return len(step.copy_C) * len(step.expert_E) <= SMALL


@compiled
def try_relief(step: Step, group: Group, counts_RE: Counts, work: int) -> int:
    """Replicas of the slowest rank's experts, in place of others and given in place of others. ``work``: done so far."""
    if work >= group.most_work:
        return work
    kept = empty_step(len(step.copy_C), len(step.expert_E), len(step.rank_R))
    copy_step(step, kept)
    return _relief_tried(
        step, group, counts_RE, kept, np.zeros((len(step.expert_E), len(step.rank_R)), dtype=np.bool_), work
    )


@borrowing
def _relief_tried(
    step: Step, group: Group, counts_RE: Counts, kept: Step, tried_ER: npt.NDArray[np.bool_], work: int
) -> int:
    while work < group.most_work:
        before_s, goal_s = slowest_s(step), (1.0 + LATE_FRAC) * level_s(step)
        if before_s <= goal_s:
            break
        expert, rank = _most_promising(step, group, counts_RE, tried_ER, goal_s)
        if expert == NONE:
            break
        tried_ER[expert, rank] = True
        if not _bring(step, group, counts_RE, expert, rank):
            copy_step(kept, step)
            continue
        work += spread(step) + len(step.copy_C) // 8
        if slowest_s(step) < (1.0 - CLOSE_FRAC) * before_s:
            copy_step(step, kept)
            tried_ER[:] = False
        else:
            copy_step(kept, step)
    return work


@borrowing
def _most_promising(
    step: Step, group: Group, counts_RE: Counts, tried_ER: npt.NDArray[np.bool_], goal_s: float
) -> tuple[int, int]:
    """An expert at home on the slowest rank, and the rank that could take most of it, be it in place of another."""
    per_rank, num_slots = len(group.slot_to_expert_S) // len(step.rank_R), len(group.slot_to_expert_S)
    late = latest(step)
    mine = step.rank_R[late]
    best, taker, most_s = NONE, NONE, 0.0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        if rank == late or its["seconds"] >= goal_s:
            continue
        lost = np.inf if its["slots"] == 0 else 0.0
        for slot in range(num_slots + rank * group.replica_slots, num_slots + (rank + 1) * group.replica_slots):
            if step.copy_C[slot]["expert"] != NONE:
                lost = min(lost, step.copy_C[slot]["quota"])
        if lost == np.inf:
            continue
        for place in range(late * per_rank, (late + 1) * per_rank):
            copy = step.copy_C[place]
            expert = copy["expert"]
            if expert == NONE or tried_ER[expert, rank]:
                continue
            local = min(float(counts_RE[rank, expert]), copy["quota"])
            room = (goal_s - its["seconds"]) / its["token_s"] + lost
            gain_s = min(copy["quota"], room) * mine["token_s"] + local * mine["in_s"] - 0.5 * lost * its["token_s"]
            if gain_s > most_s and not holds(step, expert, rank):
                best, taker, most_s = expert, rank, gain_s
    return best, taker


@borrowing
def _bring(step: Step, group: Group, counts_RE: Counts, expert: int, rank: int) -> bool:
    """Puts a replica on ``rank``, in place of its smallest one, and of the smallest that the source gives, where need be."""
    begin = len(group.slot_to_expert_S) + rank * group.replica_slots
    if step.rank_R[rank]["slots"] == 0:
        slot = _smallest(step, begin, begin + group.replica_slots, NONE)
        if slot == NONE:
            return False
        drop_replica(step, slot)
    source = source_of(step, expert)
    if source == NONE:
        source = step.copy_C[step.expert_E[expert]["first"]]["rank"]
        given = _smallest(step, len(group.slot_to_expert_S), len(step.copy_C), source)
        if given == NONE:
            return False
        drop_replica(step, given)
    take_born(step, add_replica(step, group, counts_RE, expert, source, rank))
    return True


@borrowing
def _smallest(step: Step, begin: int, end: int, source: int) -> int:
    """The replica with the fewest tokens in some slots, from ``source`` (NONE: any)."""
    best, least = NONE, np.inf
    for slot in range(begin, end):
        copy = step.copy_C[slot]
        if copy["expert"] != NONE and copy["quota"] < least and (source == NONE or copy["source"] == source):
            best, least = slot, copy["quota"]
    return best


@compiled
def try_others(step: Step, group: Group, counts_RE: Counts, work: int) -> int:
    """Replicas added, or put in place of others, where that may bring the level down: by what stays off the links."""
    if group.replica_slots == 0 or work >= group.most_work:
        return work
    kept = empty_step(len(step.copy_C), len(step.expert_E), len(step.rank_R))
    return _others_tried(step, group, counts_RE, kept, work)


@borrowing
def _others_tried(step: Step, group: Group, counts_RE: Counts, kept: Step, work: int) -> int:
    num_experts, num_ranks = counts_RE.shape[1], len(step.rank_R)
    is_kept, improved = False, True
    while improved:
        improved = False
        for slot in range(len(group.slot_to_expert_S), len(step.copy_C)):
            rank = step.copy_C[slot]["rank"]
            before_s, its, old = slowest_s(step), step.rank_R[rank], step.copy_C[slot]
            least = (CLOSE_FRAC / 2) * before_s * num_ranks / its["out_s"]
            least += min(old["quota"], old["born"]) if old["expert"] != NONE else its["active_s"] / its["out_s"]
            if is_small(step):
                least = 0.0
            for expert in range(num_experts):
                if counts_RE[rank, expert] <= least or holds(step, expert, rank):
                    continue
                if work >= group.most_work:
                    return work
                if not is_kept:
                    copy_step(step, kept)
                    is_kept = True
                if not _exchange(step, group, counts_RE, slot, expert):
                    continue
                work += spread(step) + len(step.copy_C) // 8
                if slowest_s(step) < (1.0 - CLOSE_FRAC / 2) * before_s:
                    copy_step(step, kept)
                    improved = True
                    break
                copy_step(kept, step)
    return work


@compiled
def try_fewer(step: Step, group: Group, work: int) -> None:
    """Copies, replicas or not, that compute nothing: one active expert less."""
    if work >= group.most_work or not is_small(step):
        return
    kept = empty_step(len(step.copy_C), len(step.expert_E), len(step.rank_R))
    copy_step(step, kept)
    _fewer_tried(step, group, kept, work)


@borrowing
def _fewer_tried(step: Step, group: Group, kept: Step, work: int) -> None:
    least_s = CLOSE_FRAC * slowest_s(step) * len(step.rank_R)
    for place in range(len(step.copy_C)):
        copy = step.copy_C[place]
        its = step.rank_R[copy["rank"]]
        if copy["expert"] == NONE or copy["quota"] == 0.0 or its["active_s"] + its["copy_s"] < least_s:
            continue
        if _active_copies(step, copy["expert"]) < 2:
            continue
        if work >= group.most_work:
            return
        before_s, expert = slowest_s(step), copy["expert"]
        if place < len(group.slot_to_expert_S):
            copy["shut"] = 1
        else:
            drop_replica(step, place)
        fill(step, expert, np.inf)
        work += spread(step) + len(step.copy_C) // 8
        if slowest_s(step) < (1.0 - CLOSE_FRAC / 2) * before_s:
            copy_step(step, kept)
        else:
            copy_step(kept, step)


@borrowing
def source_of(step: Step, expert: int) -> int:
    """The rank that has the expert at home and may still give most."""
    best, most = NONE, 0
    place = step.expert_E[expert]["first"]
    while place != NONE:
        copy = step.copy_C[place]
        gives = step.rank_R[copy["rank"]]["gives"]
        if copy["source"] == NONE and gives > most:
            best, most = copy["rank"], gives
        place = copy["next"]
    return best


@borrowing
def take_born(step: Step, copy: int) -> None:
    """Tokens born on a new copy's rank, out of those that come to the first copy from elsewhere."""
    new = step.copy_C[copy]
    place = step.expert_E[new["expert"]]["first"]
    first = step.copy_C[place]
    tokens = min(new["born"], first["quota"] - min(first["quota"], first["born"]))
    if first["quota"] - tokens < step.rank_R[first["rank"]]["least"]:
        tokens = first["quota"]
    if tokens >= min(step.rank_R[new["rank"]]["least"], first["quota"]) and tokens >= 1.0:
        set_quota(step, place, first["quota"] - tokens)
        set_quota(step, copy, tokens)


@borrowing
def _active_copies(step: Step, expert: int) -> int:
    count, place = 0, step.expert_E[expert]["first"]
    while place != NONE:
        count += 1 if step.copy_C[place]["quota"] > 0.0 else 0
        place = step.copy_C[place]["next"]
    return count


@borrowing
def _exchange(step: Step, group: Group, counts_RE: Counts, slot: int, expert: int) -> bool:
    """Puts a replica of ``expert`` into ``slot``, whatever is there; False, and nothing done, where none may come."""
    old = step.copy_C[slot]
    is_free = old["expert"] == NONE
    source = source_of(step, expert)
    place = step.expert_E[expert]["first"]
    while source == NONE and not is_free and place != NONE:
        copy = step.copy_C[place]
        if copy["source"] == NONE and copy["rank"] == old["source"]:
            source = old["source"]  # gives this one in place of the old one
        place = copy["next"]
    if source == NONE or (is_free and step.rank_R[old["rank"]]["slots"] == 0):
        return False
    if not is_free:
        drop_replica(step, slot)
    take_born(step, add_replica(step, group, counts_RE, expert, source, old["rank"]))
    return True
