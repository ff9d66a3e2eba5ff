"""Where experts lie on unequal ranks: contiguous, token-balanced, speed-aware, beside what no placement can beat.

Placements are made from passes over other text of the same kind, run before under the contiguous one, which is also where the
ranks' costs come from. Then all three take turns over the same passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.bench.parallel.case import Case, cycled, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session
from poise.plan.bound import bound_s_L
from poise.plan.eplb import balance_tokens
from poise.plan.observed_costs import fit, rank_costs
from poise.plan.placement import place_on
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import RankCosts
from poise.spec.placement import Placement, as_slots, contiguous

POLICIES = ("contiguous", "token-balanced", "speed-aware")
ROUNDS = 2
WARM_UP = 3
"""Passes that are not counted, of each job."""
PROFILE_PASSES = 8


def measure(
    session: Session,
    case: Case,
    directory: Path,
    *,
    kinds: tuple[str, str],
    rows_per_rank: int,
    passes: int,
    rounds: int = ROUNDS,
    redundant_slots: int = 2,
) -> dict[str, Any]:
    """``kinds``: of rows to make placements from, and to measure. ``passes``: of each policy in each round."""
    rows = rows_per_rank * len(session.layout.ranks)
    profile, measured = (
        write_rows(directory / f"{case.model.name}-{name}.json", cycled(case.rows[kind], count * rows))
        for name, kind, count in (
            ("profile", kinds[0], PROFILE_PASSES + WARM_UP),
            ("measured", kinds[1], passes + WARM_UP),
        )
    )

    def run(prompts: str, placement: Placement | None) -> JobResult:
        given = {"redundant_slots": redundant_slots} if placement is None else {"placement": placement.to_json()}
        return session.run(prefill_job(case, prompts, rows_per_rank=rows_per_rank, keeps_records=True, **given))

    first = run(profile, None)
    placements = placements_of(_loads(first), costs_of([first]), redundant_slots)
    runs: dict[str, list[JobResult]] = {name: [] for name in POLICIES}
    for number in range(rounds):
        for name in POLICIES if number % 2 == 0 else POLICIES[::-1]:
            runs[name].append(run(measured, placements[name]))
    costs = costs_of([each for name in POLICIES for each in runs[name]])
    load_LE = np.concatenate([_loads(each) for each in runs["contiguous"]]).mean(axis=0)
    slots = placements["contiguous"].slots_per_rank
    bound_s = float(bound_s_L(load_LE, costs, slots_per_rank=slots).sum())
    facts = {name: summary(runs[name], bound_s) for name in POLICIES}
    return {
        "model": case.name,
        "text": kinds[1],
        "shares": [limits.cores for limits in session.layout.ranks],
        "tokens_per_rank": rows_per_rank * case.rows[kinds[1]].shape[1],
        "slots_per_rank": slots,
        "passes": rounds * passes,
        "bound_s": bound_s,
        "policies": facts,
    }


def costs_of(results: Sequence[JobResult], passes: int | None = None) -> RankCosts:
    """A line for each rank through all layers that it computed, in the first ``passes``."""
    records = [_records(each)[:, :passes] for each in results]
    records_RNF = np.concatenate([each.reshape(len(each), -1, 3) for each in records], axis=1)
    costs = rank_costs([fit(*records_NF.T) for records_NF in records_RNF])
    assert costs is not None, "ranks have computed"
    return costs


def summary(results: Sequence[JobResult], bound_s: float) -> dict[str, Any]:
    """``expert_s``: the slowest rank of each layer, summed over layers; medians over passes of all rounds, and by round."""
    step_P = np.concatenate([each.step_s_P[WARM_UP:] for each in results])
    seconds_PLR = [_records(each)[..., 2].transpose(1, 2, 0)[WARM_UP:] for each in results]
    slowest_P = np.concatenate([each.max(axis=2).sum(axis=1) for each in seconds_PLR])
    all_PLR = np.concatenate(seconds_PLR)
    pairs_PLR = np.concatenate([_records(each)[..., 0].transpose(1, 2, 0)[WARM_UP:] for each in results])
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "step_s_by_round": [float(np.median(each.step_s_P[WARM_UP:])) for each in results],
        "expert_s": float(np.median(slowest_P)),
        "bound_frac": bound_s / float(np.median(slowest_P)),
        "time_imbalance": _imbalance(all_PLR),
        "token_imbalance": _imbalance(pairs_PLR),
    }


def placements_of(
    loads_PLE: npt.NDArray[np.float64], costs: RankCosts, redundant_slots: int
) -> Mapping[str, Placement]:
    """By ``POLICIES``, for the choices of some passes."""
    layers, experts = loads_PLE.shape[1:]
    ranks = costs.num_ranks
    slots = -(-experts // ranks) + redundant_slots
    load_LE = loads_PLE.sum(axis=0)
    request = PlacementRequest(load_LE=load_LE, num_ranks=ranks, slots_per_rank=slots, steps=len(loads_PLE))
    chosen = {
        "token-balanced": balance_tokens(load_LE, num_slots=ranks * slots, num_ranks=ranks),
        "speed-aware": place_on(request, costs, expert_bytes=1).slot_to_expert_LS,
    }
    first = contiguous(tuple(range(layers)), num_experts=experts, ranks=ranks, slots_per_rank=slots)
    return {"contiguous": first} | {
        name: Placement(
            slot_to_expert_LS=as_slots(rows.tolist()), layers=first.layers, num_experts=experts, ranks=ranks
        )
        for name, rows in chosen.items()
    }


def _records(result: JobResult) -> npt.NDArray[np.float64]:
    assert result.records_RPLN is not None, "the job keeps records"
    return result.records_RPLN


def _loads(result: JobResult) -> npt.NDArray[np.float64]:
    """Of the passes that count."""
    assert result.load_PLE is not None, "the job keeps records"
    return result.load_PLE[WARM_UP:]


def _imbalance(values_PLR: npt.NDArray[np.float64]) -> float:
    """Most of a rank over the mean; mean over layers and passes."""
    return float((values_PLR.max(axis=2) / values_PLR.mean(axis=2)).mean())
