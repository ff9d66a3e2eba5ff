"""Bound, exact optimum and plan on small cases: integer programs (HiGHS) without copies to spare, all placements with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from poise.cost.curves import ClosedFormCurve, PointCurve
from poise.cost.experts import ExpertCurve
from poise.plan.anew import shared_copies_L
from poise.plan.expert_loads import active_share
from poise.plan.placement import PlacementPlan, place_on, predict_s_LR
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import Floats, RankCosts

ACTIVE_S, TOKEN_S = 40e-6, 1e-6
STRAIGHT = ExpertCurve({1: ClosedFormCurve(ACTIVE_S, TOKEN_S, 1.0)})
BENT = ExpertCurve({1: ClosedFormCurve(ACTIVE_S, TOKEN_S, 1.5)})
STEPS = ExpertCurve({1: PointCurve([1, 32, 33, 64, 65, 256], [2e-5, 2e-5, 4e-5, 4e-5, 6e-5, 2e-4])})


def plan_for(load_LE: Floats, costs: RankCosts, slots_per_rank: int) -> PlacementPlan:
    request = PlacementRequest(load_LE=load_LE, num_ranks=costs.num_ranks, slots_per_rank=slots_per_rank)
    return place_on(request, costs, expert_bytes=1)


def exact_s(load_E: Floats, speed_R: Floats, slots_per_rank: int) -> float:
    """Optimum for the straight curve: minimise T with the time of each rank below it; x[e, r] places expert e on r."""
    experts, ranks = len(load_E), len(speed_R)
    each_E = ACTIVE_S * active_share(load_E) + TOKEN_S * load_E
    scale = each_E.sum()
    placed_once = np.hstack([np.kron(np.eye(experts), np.ones(ranks)), np.zeros((experts, 1))])
    slots = np.hstack([np.kron(np.ones(experts), np.eye(ranks)), np.zeros((ranks, 1))])
    seconds = np.hstack([np.kron(each_E / scale, np.diag(1 / speed_R)), -np.ones((ranks, 1))])
    solution = milp(
        np.append(np.zeros(experts * ranks), 1.0),
        integrality=np.append(np.ones(experts * ranks), 0),
        bounds=Bounds(0, np.append(np.ones(experts * ranks), np.inf)),
        constraints=[
            LinearConstraint(placed_once, 1, 1),
            LinearConstraint(slots, 0, slots_per_rank),
            LinearConstraint(seconds, -np.inf, 0),
        ],
        options={"mip_rel_gap": 1e-5},
    )
    assert solution.success, solution.message
    return float(solution.fun * scale)


def test_close_to_the_integer_program_where_experts_lie_once() -> None:
    rng = np.random.default_rng(0)
    plan_gaps, bound_gaps = [], []
    for experts, ranks in ((8, 2), (12, 2), (12, 3), (12, 4)):
        load_LE = rng.lognormal(0.0, 1.0, (3, experts)) * 100
        speed_R = rng.uniform(0.75, 1.0, ranks)
        plan = plan_for(load_LE, RankCosts.of_curves([STRAIGHT] * ranks, speed_R), experts // ranks)
        optimum_L = np.array([exact_s(load_E, speed_R, experts // ranks) for load_E in load_LE])
        assert (plan.bound_s_L <= optimum_L * (1 + 1e-4)).all()
        assert (plan.predicted_s_L >= optimum_L * (1 - 1e-4)).all()
        plan_gaps += (plan.predicted_s_L / optimum_L - 1).tolist()
        bound_gaps += (1 - plan.bound_s_L / optimum_L).tolist()
    assert np.mean(plan_gaps) < 0.02, plan_gaps
    assert np.max(plan_gaps) < 0.06, plan_gaps
    assert np.mean(bound_gaps) < 0.03, bound_gaps


def brute_force_s(load_E: Floats, costs: RankCosts, slots_per_rank: int, *, apart: bool) -> float:
    """The best of all placements, copies included. ``apart``: copies of an expert do not share a rank."""
    experts = range(len(load_E))
    choose = itertools.combinations if apart else itertools.combinations_with_replacement
    per_rank = list(choose(experts, slots_per_rank))
    rows = np.array([sum(rows, ()) for rows in itertools.product(per_rank, repeat=costs.num_ranks)])
    whole = np.all([(rows == expert).any(axis=1) for expert in experts], axis=0)
    placements = rows[whole]
    return float(predict_s_LR(np.tile(load_E, (len(placements), 1)), placements, costs).max(axis=1).min())


@pytest.mark.parametrize("curve", [STRAIGHT, BENT, STEPS])
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(4, 2, 3), (4, 3, 2), (3, 2, 3), (5, 2, 4), (6, 3, 3)])
def test_close_to_the_best_of_all_placements_with_copies(
    curve: ExpertCurve, experts: int, ranks: int, slots: int
) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + slots)
    load_LE = rng.lognormal(0.0, 1.0, (6, experts)) * np.array([1, 1, 10, 10, 100, 100])[:, None]
    load_LE[0, 0] = 0.0
    costs = RankCosts.of_curves([curve] * ranks, rng.uniform(0.75, 1.0, ranks))
    plan = plan_for(load_LE, costs, slots)
    apart_L = np.array([brute_force_s(load_E, costs, slots, apart=True) for load_E in load_LE])
    assert (plan.predicted_s_L >= apart_L * (1 - 1e-9)).all()
    assert np.mean(plan.predicted_s_L / apart_L) < 1.03, plan.predicted_s_L / apart_L
    assert (plan.bound_s_L <= apart_L * (1 + 1e-9)).all()


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(4, 2, 3), (4, 3, 2), (5, 2, 4), (5, 3, 3), (6, 3, 3)])
def test_equal_ranks_share_copies_only_where_no_placement_without_is_as_fast(
    experts: int, ranks: int, slots: int
) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + slots)
    load_LE = rng.pareto(1.2, (40, experts)) * 100
    costs = RankCosts.of_curves([STRAIGHT] * ranks)
    plan = plan_for(load_LE, costs, slots)
    shares_L = shared_copies_L(plan.slot_to_expert_LS, ranks) > 0
    apart_s = np.array([brute_force_s(load_E, costs, slots, apart=True) for load_E in load_LE[shares_L]])
    assert shares_L.sum() < 20
    assert (apart_s > plan.predicted_s_L[shares_L]).all(), "the search misses none that is as fast"
