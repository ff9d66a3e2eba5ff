"""Balance: a rank that is late hands tokens of an expert to the rank that can take most, which gets a replica in a free slot.

The latest first, until no rank is later than the level by more than relieving it would cost others. A rank that may give, too,
takes more than it has room for, and passes on what is its own. All takers of an expert are weighed at once, in plain arrays,
which compilers make vector instructions of. Compiled loops on ``balance_state``.
Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from poise.plan.balance_spread import LATE_FRAC, fill
from poise.plan.balance_state import NONE, Counts, Group, Step, add_replica, latest, level_s, set_quota
from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Floats, Ints

HAND_OVER_WORK = 8
"""Setting so many copies takes about as long as one hand-over."""
LATE_ACTIVE = 0.5
"""So many active experts may a rank be late by, if that is more than ``LATE_FRAC``."""


class Ranks(NamedTuple):
    """``seconds_R`` to ``gives_R``: of the records, as they are now. ``extra_s_R``: of taking in a replica; neither it nor the
    next three change. For one giver: ``room_s_R``, until a rank is as late as it may be; ``passes_R``: tokens that it takes in
    any case, as it can pass on others; -inf: none. For one expert: ``born_R``, -1 where a copy is, and ``saved_s_R``.
    ``most_s_R``: the most of all of the giver's experts, ``place_R``: of the copy at this place."""

    seconds_R: Floats
    slots_R: Floats
    gives_R: Floats
    extra_s_R: Floats
    out_s_R: Floats
    per_token_s_R: Floats
    least_R: Floats
    room_s_R: Floats
    passes_R: Floats
    born_R: Floats
    saved_s_R: Floats
    most_s_R: Floats
    place_R: Ints


@borrowing
def is_uneven(step: Step) -> bool:
    """Whether a rank is later than it may be."""
    late = step.rank_R[latest(step)]
    return _is_late(late, _goal_s(level_s(step), _extra_active_s(step)))


@borrowing
def _goal_s(level: float, active_s: float) -> float:
    """As late as a rank may be: to relieve it of less costs others more, an active expert for each replica."""
    return level + max(LATE_FRAC * level, LATE_ACTIVE * active_s)


@borrowing
def _extra_active_s(step: Step) -> float:
    """Of one more active expert and of moving it, on both sides, in the mean over ranks."""
    active_s = 0.0
    for rank in range(len(step.rank_R)):
        active_s += step.rank_R[rank]["active_s"] + 2.0 * step.rank_R[rank]["copy_s"]
    return active_s / len(step.rank_R)


@borrowing
def _is_late(rank: Any, goal_s: float) -> bool:
    """By as many tokens as another rank may be given of an expert."""
    return bool(rank["seconds"] > goal_s + rank["least"] * rank["token_s"])


@compiled
def relieve(step: Step, group: Group, counts_RE: Counts) -> int:
    """Late ranks hand tokens over, the latest first, until all finish by the goal or none can any more. Returns the work."""
    return _relieve(step, group, counts_RE, _ranks_of(step), np.zeros(len(step.rank_R), dtype=np.bool_))


@borrowing
def _relieve(step: Step, group: Group, counts_RE: Counts, ranks: Ranks, spent_R: npt.NDArray[np.bool_]) -> int:
    """``spent_R``: ranks that have nothing more to hand over."""
    num_ranks, work, weights, active_s = len(step.rank_R), 0, 0.0, _extra_active_s(step)
    for rank in range(num_ranks):
        weights += step.rank_R[rank]["weight"]
    weighted_s = weights * level_s(step)
    for _ in range(num_ranks * (1 + group.replica_slots)):
        goal_s, late = _goal_s(weighted_s / weights, active_s), largest(ranks.seconds_R)
        if not _is_late(step.rank_R[late], goal_s):
            break
        giver = late if not spent_R[late] else _partner(step, group, late, spent_R, goal_s)
        if giver == NONE:
            break
        work += HAND_OVER_WORK
        copy, taker, tokens = _best_hand_over(step, group, counts_RE, ranks, giver, goal_s)
        if copy == NONE:
            spent_R[giver] = True
            continue
        new = add_replica(step, group, counts_RE, step.copy_C[copy]["expert"], giver, taker)
        set_quota(step, copy, step.copy_C[copy]["quota"] - tokens)
        set_quota(step, new, tokens)
        if giver == late:
            weighted_s += _look_again(step, ranks, giver) + _look_again(step, ranks, taker)
        else:
            work += _refill(step, group, giver)
            for rank in range(num_ranks):
                weighted_s += _look_again(step, ranks, rank)
    return work


@borrowing
def _places(step: Step, group: Group) -> int:
    """Copies that a rank can hold."""
    return len(group.slot_to_expert_S) // len(step.rank_R) + group.replica_slots


@borrowing
def _copy_at(step: Step, group: Group, rank: int, place: int) -> int:
    """The rank's ``place``-th copy: home slots, then replica slots."""
    num_slots = len(group.slot_to_expert_S)
    per_rank = num_slots // len(step.rank_R)
    if place < per_rank:
        return rank * per_rank + place
    return num_slots + rank * group.replica_slots + place - per_rank


@borrowing
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


@borrowing
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
def _ranks_of(step: Step) -> Ranks:
    count = len(step.rank_R)
    ranks = Ranks(
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count),
        np.empty(count, dtype=np.int64),
    )
    for rank in range(count):
        its = step.rank_R[rank]
        ranks.extra_s_R[rank], ranks.out_s_R[rank] = its["active_s"] + its["copy_s"], its["out_s"]
        ranks.per_token_s_R[rank], ranks.least_R[rank] = its["per_token_s"], its["least"]
        _look_again(step, ranks, rank)
    return ranks


@borrowing
def _look_again(step: Step, ranks: Ranks, rank: int) -> float:
    """Returns by how much its weighted time has changed."""
    its = step.rank_R[rank]
    change_s = its["weight"] * (its["seconds"] - ranks.seconds_R[rank])
    ranks.seconds_R[rank], ranks.slots_R[rank], ranks.gives_R[rank] = its["seconds"], its["slots"], its["gives"]
    return float(change_s)


@borrowing
def _best_hand_over(
    step: Step, group: Group, counts_RE: Counts, ranks: Ranks, giver: int, goal_s: float
) -> tuple[int, int, float]:
    """The home copy of ``giver`` and the rank that take most time off it, counting what stays off the links; -1: none."""
    mine, heaviest = step.rank_R[giver], _heaviest(step, group, giver)
    if mine["gives"] == 0 or heaviest == NONE:
        return NONE, NONE, 0.0
    excess = (mine["seconds"] + mine["copy_s"] - goal_s) * mine["weight"]
    _find_room(ranks, goal_s, excess / mine["gives"], mine["copy_s"])
    _weigh(step, counts_RE, ranks, giver, heaviest, excess)
    best_s = ranks.most_s_R[largest(ranks.most_s_R)]
    per_rank = len(group.slot_to_expert_S) // len(step.rank_R)
    most, way_s = excess + mine["least"], mine["token_s"] + mine["in_s"]
    for place in range(giver * per_rank, (giver + 1) * per_rank):
        copy = step.copy_C[place]
        if place != heaviest and copy["expert"] != NONE and min(copy["quota"], most) * way_s > best_s:
            _weigh(step, counts_RE, ranks, giver, place, excess)
    taker = largest(ranks.most_s_R)
    place = ranks.place_R[taker]
    if place == NONE:
        return NONE, NONE, 0.0
    copy = step.copy_C[place]
    local = min(float(counts_RE[taker, copy["expert"]]), copy["quota"])
    return place, taker, _tokens_moved(ranks, taker, local, copy["quota"], excess, mine["least"])


@borrowing
def _heaviest(step: Step, group: Group, giver: int) -> int:
    """Its home copy with most tokens."""
    per_rank = len(group.slot_to_expert_S) // len(step.rank_R)
    best, most = NONE, 0.0
    for place in range(giver * per_rank, (giver + 1) * per_rank):
        copy = step.copy_C[place]
        if copy["expert"] != NONE and copy["quota"] > most:
            best, most = place, copy["quota"]
    return best


@borrowing
def _find_room(ranks: Ranks, goal_s: float, passes: float, copy_s: float) -> None:
    """A copy takes ``copy_s`` of the giver, at least so much must be saved."""
    for rank in range(len(ranks.room_s_R)):
        takes = (ranks.slots_R[rank] > 0.0) & (ranks.seconds_R[rank] < goal_s)
        room_s = goal_s - ranks.seconds_R[rank] - ranks.extra_s_R[rank]
        ranks.room_s_R[rank] = room_s if takes else -np.inf
    for rank in range(len(ranks.room_s_R)):
        takes = (ranks.room_s_R[rank] > -np.inf) & (ranks.gives_R[rank] > 0.0)
        ranks.passes_R[rank] = passes if takes else -np.inf
    for rank in range(len(ranks.room_s_R)):
        ranks.most_s_R[rank], ranks.place_R[rank] = copy_s, NONE


@borrowing
def _weigh(step: Step, counts_RE: Counts, ranks: Ranks, giver: int, place: int, excess: float) -> None:
    """What each rank takes off the giver with tokens of the copy at ``place``, where that is more than with others."""
    expert, quota = step.copy_C[place]["expert"], step.copy_C[place]["quota"]
    for rank in range(len(ranks.born_R)):
        ranks.born_R[rank] = counts_RE[rank, expert]
    copy = step.expert_E[expert]["first"]
    while copy != NONE:
        ranks.born_R[step.copy_C[copy]["rank"]] = -1.0
        copy = step.copy_C[copy]["next"]
    mine = step.rank_R[giver]
    _save(ranks, quota, excess, mine["token_s"], mine["in_s"], mine["least"])
    for rank in range(len(ranks.born_R)):
        saved_s, most_s, before = ranks.saved_s_R[rank], ranks.most_s_R[rank], ranks.place_R[rank]
        ranks.place_R[rank] = place if saved_s > most_s else before
        ranks.most_s_R[rank] = saved_s if saved_s > most_s else most_s


@borrowing
def _save(ranks: Ranks, quota: float, excess: float, token_s: float, in_s: float, least: float) -> None:
    """Sets ``saved_s_R``, 0 where a rank can take too few."""
    for rank in range(len(ranks.born_R)):
        born = ranks.born_R[rank]
        local = min(born, quota)
        tokens = _tokens_moved(ranks, rank, local, quota, excess, least)
        saved_s, fewest = tokens * token_s + in_s * min(local, tokens), max(1.0, min(ranks.least_R[rank], quota))
        ranks.saved_s_R[rank] = saved_s if (tokens >= fewest) & (born >= 0.0) else 0.0


@borrowing
def _tokens_moved(ranks: Ranks, rank: int, local: float, quota: float, excess: float, least: float) -> float:
    """As many as the giver has too many and the rank has room for; all, where fewer than the ``least`` would stay."""
    room = (ranks.room_s_R[rank] + ranks.out_s_R[rank] * local) * ranks.per_token_s_R[rank]
    tokens = max(min(min(quota, excess), room), min(quota, ranks.passes_R[rank]))
    return quota if quota - tokens < least else tokens


@borrowing
def largest(figures_R: Floats) -> int:
    largest = 0
    for rank in range(1, len(figures_R)):
        if figures_R[rank] > figures_R[largest]:
            largest = rank
    return largest
