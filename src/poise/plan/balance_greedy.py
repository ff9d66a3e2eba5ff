"""Which replicas come for one step: the paper's greedy search (PROBE, section 4.2), on the same state and cost as ours.

Again and again the slowest rank's heaviest expert gets a replica on the fastest rank: the source keeps the tokens born on it,
the destination takes those born on itself, and of the others as many as bring the source down to the average load. Compiled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.balance_state import NONE, Counts, Group, Step, add_replica, holds, latest, set_quota
from poise.plan.compiled import borrowing, compiled

MOST_ROUNDS = 16
"""k_max of the paper."""


@compiled
def choose_greedily(step: Step, group: Group, counts_RE: Counts, least_gain_s: float) -> None:
    """Adds replicas to ``step`` with their tokens. Ends when a round gains ``least_gain_s`` (the paper's eps) or less."""
    num_ranks = len(step.rank_R)
    average = 0.0
    for rank in range(num_ranks):
        average += step.rank_R[rank]["tokens"] / num_ranks
    tried_RR = np.zeros((num_ranks, num_ranks), dtype=np.bool_)
    for _ in range(MOST_ROUNDS):
        source = latest(step)
        before_s = step.rank_R[source]["seconds"]
        target = _fastest(step, tried_RR, source)
        if target == NONE:
            return
        copy = _heaviest_without_copy(step, group, source, target)
        tokens = 0.0
        if copy != NONE and step.rank_R[target]["slots"] > 0 and step.rank_R[source]["gives"] > 0:
            tokens = _water_filling(step, copy, float(counts_RE[target, step.copy_C[copy]["expert"]]), average)
        if tokens <= 0.0:
            tried_RR[source, target] = True
            continue
        new = add_replica(step, group, counts_RE, step.copy_C[copy]["expert"], source, target)
        set_quota(step, copy, step.copy_C[copy]["quota"] - tokens)
        set_quota(step, new, tokens)
        after_s = max(step.rank_R[source]["seconds"], step.rank_R[target]["seconds"])
        if before_s - after_s <= least_gain_s:
            return


@borrowing
def _fastest(step: Step, tried_RR: npt.NDArray[np.bool_], source: int) -> int:
    best, least_s = NONE, step.rank_R[source]["seconds"]
    for rank in range(len(step.rank_R)):
        if step.rank_R[rank]["seconds"] < least_s and not tried_RR[source, rank]:
            best, least_s = rank, step.rank_R[rank]["seconds"]
    return best


@borrowing
def _heaviest_without_copy(step: Step, group: Group, source: int, target: int) -> int:
    per_rank = len(group.slot_to_expert_S) // len(step.rank_R)
    best, most = NONE, 0.0
    for place in range(source * per_rank, (source + 1) * per_rank):
        copy = step.copy_C[place]
        if copy["quota"] > most and not holds(step, copy["expert"], target):
            best, most = place, copy["quota"]
    return best


@borrowing
def _water_filling(step: Step, place: int, born: float, average: float) -> float:
    """Tokens that move: those ``born`` on the target, and those born at ranks without a copy until the source is at the
    average."""
    copy = step.copy_C[place]
    movable = copy["quota"] - min(copy["quota"], copy["born"])
    local = min(born, movable)
    excess = max(0.0, step.rank_R[copy["rank"]]["tokens"] - local - average)
    return float(local + int(min(movable - local, excess)))
