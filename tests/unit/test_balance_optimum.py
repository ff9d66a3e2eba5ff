"""Bound, exact optimum (an integer program, HiGHS) and plan on small steps."""

from __future__ import annotations

import numpy as np
import pytest

from poise.bench.balance.optimum import GAP_FRAC, SmallCase, optimum_s, small_cases
from poise.plan.balance_bound import step_bound_s


def bound_of(case: SmallCase) -> float:
    ranks, experts = case.counts_RE.shape
    return step_bound_s(
        case.counts_RE,
        np.arange(experts),
        case.costs,
        token_s_R=np.full(ranks, case.way_s),
        slots_R=np.full(ranks, case.slots),
        gives_R=np.full(ranks, case.gives),
    )


def check(cases: list[SmallCase], *, worst: float, mean: float) -> None:
    optimum_N = np.array([optimum_s(case) for case in cases])
    bound_N = np.array([bound_of(case) for case in cases])
    ours_N = np.array([case.plan_s("quota") for case in cases])
    assert (bound_N <= optimum_N * (1.0 + 1e-6)).all(), (bound_N / optimum_N).max()
    assert (bound_N >= 0.6 * optimum_N).all(), (bound_N / optimum_N).min()
    over_N = ours_N / optimum_N
    assert (over_N >= 1.0 - 2 * GAP_FRAC).all(), "the optimum is none"
    assert over_N.max() <= worst
    assert over_N.mean() <= mean


def test_plans_are_near_the_optimum_and_the_bound_below_it() -> None:
    check([case for case in small_cases(seeds=2) if len(case.counts_RE) == 3], worst=1.05, mean=1.02)


@pytest.mark.slow
def test_plans_are_near_the_optimum_in_many_cases() -> None:
    check(small_cases(seeds=8), worst=1.08, mean=1.012)


def test_more_slots_and_windows_lower_the_bound_and_none_raise_it() -> None:
    case = small_cases(seeds=3)[40]
    ranks, experts = case.counts_RE.shape
    bounds = [
        step_bound_s(
            case.counts_RE,
            np.arange(experts),
            case.costs,
            token_s_R=np.full(ranks, case.way_s),
            slots_R=np.full(ranks, slots),
            gives_R=np.full(ranks, gives),
        )
        for slots, gives in ((0, 0), (1, 1), (2, 2), (experts, ranks * experts))
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
    assert step_bound_s(
        np.zeros_like(case.counts_RE),
        np.arange(experts),
        case.costs,
        token_s_R=np.full(ranks, case.way_s),
        slots_R=np.full(ranks, 1),
        gives_R=np.full(ranks, 1),
    ) == pytest.approx(0.0)
