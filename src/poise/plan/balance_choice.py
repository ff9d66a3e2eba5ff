"""Which replicas come for one step: ours, by what they save of the links and of the slowest rank.

1. Locality: the heaviest experts get copies where most of their tokens are born, as far as that saves more on the links than
   one more active expert costs. Tokens are spread over the copies.
2. Balance (``balance_relief``): a rank that is late hands tokens of its heaviest expert to the one that can take most.
3. Trials (``balance_trials``), as many as there is time for.

Replicas are limited by slots and windows, not by a count of rounds. Compiled loops on ``balance_state``.
Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.balance_relief import is_uneven, largest, relieve
from poise.plan.balance_spread import spread
from poise.plan.balance_state import (
    NONE,
    Counts,
    Group,
    Step,
    add_replica,
    copy_step,
    drop_replica,
    empty_step,
    level_s,
    slowest_s,
)
from poise.plan.balance_trials import source_of, take_born, try_fewer, try_others, try_relief
from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Floats, Ints

LINKS_FRAC = 0.4
"""Of a token's time in its expert, from which on its way decides which replicas come first."""
MOST_BORN = 2.0**31 - 1.0
"""As counts are 32 bits wide."""
LEAST_SAVED_FRAC = 0.005
"""Of the time: what a replica must save on its rank's link beyond an active expert, to come for that alone."""


@compiled
def choose(step: Step, group: Group, counts_RE: Counts) -> None:
    """Adds replicas to ``step`` and spreads all tokens."""
    links_first = _links_weigh(step)
    work = _in_order(step, group, counts_RE, links_first)
    if work < group.most_work and is_uneven(step):
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


@borrowing
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
        work = spread(step) + relieve(step, group, counts_RE)
    else:
        work = relieve(step, group, counts_RE)
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
    least_s, free = LEAST_SAVED_FRAC * level_s(step), 0
    for rank in range(len(step.rank_R)):
        free += step.rank_R[rank]["slots"]
    if free == 0:
        return
    expert_N = _worth_a_look(step, counts_RE, least_s)
    held_R = np.zeros(len(step.rank_R), dtype=np.bool_)
    _copy_where_born(step, group, counts_RE, expert_N, np.empty(len(expert_N)), held_R, least_s, free)


@borrowing
def _copy_where_born(
    step: Step,
    group: Group,
    counts_RE: Counts,
    expert_N: Ints,
    total_N: Floats,
    held_R: npt.NDArray[np.bool_],
    least_s: float,
    free: int,
) -> None:
    """``total_N``, ``held_R``: to work in. ``free``: slots that are."""
    for place in range(len(expert_N)):
        total_N[place] = step.expert_E[expert_N[place]]["total"]
    for _ in range(len(expert_N)):
        heaviest = largest(total_N)
        total_N[heaviest], expert = -1.0, expert_N[heaviest]
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
def _worth_a_look(step: Step, counts_RE: Counts, least_s: float) -> Ints:
    """Experts of which a copy may save enough on some rank, going by tokens alone; most have none."""
    num_ranks, num_experts = counts_RE.shape
    is_open_E = np.zeros(num_experts, dtype=np.bool_)
    for rank in range(num_ranks):
        its, born_E = step.rank_R[rank], counts_RE[rank]
        fewest = (least_s + its["active_s"] + its["copy_s"]) * its["per_out_s"]
        if its["slots"] > 0 and fewest < MOST_BORN:
            least = np.int32(fewest * (1.0 - 1e-9))
            for expert in range(num_experts):
                is_open_E[expert] |= born_E[expert] > least
    return np.flatnonzero(is_open_E)


@borrowing
def _mark_holders(step: Step, expert: int, held_R: npt.NDArray[np.bool_]) -> None:
    held_R[:] = False
    place = step.expert_E[expert]["first"]
    while place != NONE:
        held_R[step.copy_C[place]["rank"]] = True
        place = step.copy_C[place]["next"]


@borrowing
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
