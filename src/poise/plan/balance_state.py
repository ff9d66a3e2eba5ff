"""A MoE layer of one step while it is balanced: copies of experts, the tokens that each computes, and when ranks finish.

A copy computes the tokens born on its own rank first. So of each expert ``max(0, quota - born)`` tokens come in over the rank's
link and ``max(0, born - quota)`` go out, whatever moved before: to set a quota is O(1). The time of a rank is that of its
experts plus dispatch and combine, twice the heavier direction of its link (PROBE's cost model); experts' time is linear
here, a plane that touches the curve where the rank is expected to end.

Arrays of records in a named tuple, because numba knows no dataclasses. Letters: R ranks, E experts, S home slots of all ranks,
C copies: the home slots, then ``replica_slots`` for each rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable

Counts = npt.NDArray[np.int32]
Records = npt.NDArray[np.void]

COPY = np.dtype(
    [
        ("expert", np.int64),
        ("rank", np.int64),
        ("next", np.int64),
        ("source", np.int64),
        ("shut", np.int64),
        ("born", np.float64),
        ("quota", np.float64),
    ]
)
"""``expert``: NONE where a slot is free. ``next``: copy of the same expert. ``source``: the rank a replica comes from, NONE at
home. ``shut``: 1 where the copy is to compute nothing. ``born``: the expert's tokens born on the rank, ``quota``: those
computed."""

EXPERT = np.dtype([("first", np.int64), ("copies", np.int64), ("total", np.float64)])
"""``first`` copy, at home; how many there are; tokens of all ranks."""

LINE = np.dtype(
    [("copy", np.int64), ("shut", np.int64)]
    + [(name, np.float64) for name in ("near", "near_rate", "far", "far_rate", "away", "away_rate", "fewest")]
    + [("share", np.float64), ("least", np.float64)]
)
"""A copy while ``balance_spread`` fills its expert."""

RANK = np.dtype(
    [(name, np.float64) for name in ("seconds", "tokens", "active", "in", "out")]
    + [(name, np.float64) for name in ("fixed_s", "active_s", "token_s", "in_s", "out_s", "weight", "least")]
    + [("copy_s", np.float64), ("copies_s", np.float64)]
    + [(name, np.float64) for name in ("per_token_s", "per_come_s", "per_leave_s", "per_in_s", "per_out_s")]
    + [("slots", np.int64), ("gives", np.int64)]
)
"""``seconds`` = ``copies_s + fixed_s + active_s * active + token_s * tokens`` and the larger of ``in_s * in`` and
``out_s * out``. ``active``: copies with tokens. ``weight``: tokens that make a second, about. ``least``: of a copy's tokens.
``copy_s``: processor time of one replica that the rank takes in or gives, ``copies_s``: of all of them. ``per_...``: one over
``token_s``, over that and ``in_s``, over that less ``out_s`` (0 where that is none), over ``in_s``, over ``out_s``.
``slots``, ``gives``: replicas that the rank may still take in and give."""

LEAST_S = 1e-18
"""Of a token on its way, so that it divides."""
NONE = -1
"""In compiled loops: no copy, no expert, no rank."""


class Group(NamedTuple):
    """What does not change between steps. ``token_s_R``: seconds of a token there and back over a rank's link; ``expert_s_R``:
    of an expert's weights, one way. ``most_work``: copies set for one plan, after which it goes on to no more trials.
    ``least_tokens``: that a copy computes, if any, and of ``least_active`` active experts' time."""

    slot_to_expert_S: Ints
    table: CostTable
    token_s_R: Floats
    expert_s_R: Floats
    replica_slots: int
    most_work: int
    least_tokens: float
    least_active: float


class Step(NamedTuple):
    """Records: ``COPY``, ``EXPERT``, ``RANK``, ``LINE``."""

    copy_C: Records
    expert_E: Records
    rank_R: Records
    line_R: Records


@compiled
def empty_step(num_copies: int, num_experts: int, num_ranks: int) -> Step:
    return Step(
        np.zeros(num_copies, dtype=COPY),
        np.zeros(num_experts, dtype=EXPERT),
        np.zeros(num_ranks, dtype=RANK),
        np.empty(num_ranks, dtype=LINE),
    )


@borrowing
def copy_step(step: Step, to: Step) -> None:
    for copy in range(len(step.copy_C)):
        to.copy_C[copy] = step.copy_C[copy]
    for expert in range(len(step.expert_E)):
        to.expert_E[expert] = step.expert_E[expert]
    for rank in range(len(step.rank_R)):
        to.rank_R[rank] = step.rank_R[rank]


@compiled
def home_step(
    counts_RE: Counts, group: Group, in_frac_R: Floats, out_frac_R: Floats, window_s_R: Floats, copy_s_R: Floats
) -> Step:
    """All tokens at home, evenly on the copies there. ``counts_RE``: token-expert assignments by the rank they are born on.

    ``in_frac_R``, ``out_frac_R``: tokens that travel over assignments that do. ``window_s_R`` limits the replicas, and each
    costs its two ranks ``copy_s_R``.
    """
    num_ranks, num_experts = counts_RE.shape
    num_slots = len(group.slot_to_expert_S)
    step = empty_step(num_slots + num_ranks * group.replica_slots, num_experts, num_ranks)
    total_E = np.zeros(num_experts, dtype=np.int64)
    for rank in range(num_ranks):
        born_E, born = counts_RE[rank], 0
        for expert in range(num_experts):
            total_E[expert] += born_E[expert]
            born += born_E[expert]
        its = step.rank_R[rank]
        its["out"] = born
        its["gives"] = int(window_s_R[rank] / group.expert_s_R[rank])
        its["slots"] = min(group.replica_slots, its["gives"])
        its["in_s"] = max(LEAST_S, group.token_s_R[rank] * in_frac_R[rank])
        its["out_s"] = max(LEAST_S, group.token_s_R[rank] * out_frac_R[rank])
        its["copy_s"] = copy_s_R[rank]
        for place in range(group.replica_slots):
            free = step.copy_C[num_slots + rank * group.replica_slots + place]
            free["expert"], free["rank"], free["next"], free["source"] = NONE, rank, NONE, NONE
    _make_homes(step, group, counts_RE, total_E)
    return step


@borrowing
def _make_homes(step: Step, group: Group, counts_RE: Counts, total_E: Ints) -> None:
    num_ranks, num_experts = counts_RE.shape
    per_rank = len(group.slot_to_expert_S) // num_ranks
    for expert in range(num_experts):
        its = step.expert_E[expert]
        its["first"], its["total"] = NONE, total_E[expert]
    for rank in range(num_ranks - 1, -1, -1):
        for slot in range((rank + 1) * per_rank - 1, rank * per_rank - 1, -1):
            expert = group.slot_to_expert_S[slot]
            its, home = step.expert_E[expert], step.copy_C[slot]
            home["rank"], home["next"], home["source"] = rank, NONE, NONE
            if its["first"] != NONE and holds(step, expert, rank):
                home["expert"] = NONE
                continue
            home["expert"], home["born"], home["next"] = expert, counts_RE[rank, expert], its["first"]
            its["first"] = slot
            its["copies"] += 1
    for expert in range(num_experts):
        its = step.expert_E[expert]
        slot, each, more = its["first"], total_E[expert], 0
        if its["copies"] > 1:
            each, more = total_E[expert] // its["copies"], total_E[expert] % its["copies"]
        while slot != NONE:
            _put(step, slot, float(each + (1 if more > 0 else 0)))
            more, slot = more - 1, step.copy_C[slot]["next"]


@borrowing
def holds(step: Step, expert: int, rank: int) -> bool:
    copy = step.expert_E[expert]["first"]
    while copy != NONE:
        if step.copy_C[copy]["rank"] == rank:
            return True
        copy = step.copy_C[copy]["next"]
    return False


@borrowing
def set_quota(step: Step, copy: int, tokens: float) -> None:
    _put(step, copy, tokens)
    its = step.rank_R[step.copy_C[copy]["rank"]]
    its["seconds"] = finish_s(its)


@borrowing
def _put(step: Step, copy: int, tokens: float) -> None:
    one = step.copy_C[copy]
    its, quota, born = step.rank_R[one["rank"]], one["quota"], one["born"]
    its["tokens"] += tokens - quota
    its["active"] += (1.0 if tokens > 0.0 else 0.0) - (1.0 if quota > 0.0 else 0.0)
    its["in"] += max(0.0, tokens - born) - max(0.0, quota - born)
    its["out"] += max(0.0, born - tokens) - max(0.0, born - quota)
    one["quota"] = tokens


@borrowing
def finish_s(its: Any) -> float:
    """When a rank (its record) has received, computed and returned, and moved its replicas."""
    seconds = its["copies_s"] + max(its["in_s"] * its["in"], its["out_s"] * its["out"])
    if its["active"] > 0.0:
        seconds += its["fixed_s"] + its["active_s"] * its["active"] + its["token_s"] * its["tokens"]
    return float(seconds)


@borrowing
def add_replica(step: Step, group: Group, counts_RE: Counts, expert: int, source: int, rank: int) -> int:
    """An empty copy, in a free slot of ``rank``."""
    copy = len(group.slot_to_expert_S) + rank * group.replica_slots
    while step.copy_C[copy]["expert"] != NONE:
        copy += 1
    first = step.copy_C[step.expert_E[expert]["first"]]
    new = step.copy_C[copy]
    new["expert"], new["source"], new["next"] = expert, source, first["next"]
    new["born"], new["quota"], new["shut"] = counts_RE[rank, expert], 0.0, 0
    first["next"] = copy
    step.expert_E[expert]["copies"] += 1
    step.rank_R[rank]["slots"] -= 1
    step.rank_R[source]["gives"] -= 1
    _count_copy(step.rank_R[rank], 1.0)
    _count_copy(step.rank_R[source], 1.0)
    return copy


@borrowing
def _count_copy(its: Any, sign: float) -> None:
    its["copies_s"] += sign * its["copy_s"]
    its["seconds"] += sign * its["copy_s"]


@borrowing
def drop_replica(step: Step, copy: int) -> None:
    """Frees a slot; its tokens go to the expert's first copy."""
    old = step.copy_C[copy]
    its, tokens = step.expert_E[old["expert"]], old["quota"]
    first = its["first"]
    set_quota(step, copy, 0.0)
    set_quota(step, first, step.copy_C[first]["quota"] + tokens)
    step.copy_C[first]["shut"] = 0
    before = first
    while step.copy_C[before]["next"] != copy:
        before = step.copy_C[before]["next"]
    step.copy_C[before]["next"] = old["next"]
    its["copies"] -= 1
    step.rank_R[old["rank"]]["slots"] += 1
    step.rank_R[old["source"]]["gives"] += 1
    _count_copy(step.rank_R[old["rank"]], -1.0)
    _count_copy(step.rank_R[old["source"]], -1.0)
    old["expert"] = NONE


@borrowing
def latest(step: Step) -> int:
    """The rank that finishes last."""
    late = 0
    for rank in range(1, len(step.rank_R)):
        if step.rank_R[rank]["seconds"] > step.rank_R[late]["seconds"]:
            late = rank
    return late


@borrowing
def slowest_s(step: Step) -> float:
    return float(step.rank_R[latest(step)]["seconds"])


@borrowing
def level_s(step: Step) -> float:
    """When all ranks would finish, could tokens go from any to any."""
    seconds = weights = 0.0
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        seconds += its["weight"] * its["seconds"]
        weights += its["weight"]
    return seconds / weights
