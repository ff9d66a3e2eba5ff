"""Copies that share a rank under the token balancer are taken apart, and the layers get no slower."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from poise.cost.curves import ClosedFormCurve
from poise.cost.experts import ExpertCurve
from poise.plan.anew import predict_s_LR, shared_copies_L
from poise.plan.annealing import anneal
from poise.plan.cost_table import cost_table
from poise.plan.eplb import balance_tokens
from poise.plan.exhaustive import fastest_apart
from poise.plan.layer_state import Limits
from poise.plan.placement import place_on
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import Floats, RankCosts

CURVE = ExpertCurve({1: ClosedFormCurve(3e-5, 1e-6, 1.25)})
MANY_STEPS = 10**8


def loads_of(layers: int, experts: int, *, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).pareto(1.2, (layers, experts)) + 0.1) * 500


def best_apart_s(load_E: Floats, costs: RankCosts, slots: int, most_alike: int) -> float:
    """Of all placements with at most so many copies of an expert on a rank; the order of ranks makes no difference."""
    whole = [
        row
        for row in itertools.combinations_with_replacement(range(len(load_E)), slots)
        if max(np.bincount(row)) <= most_alike
    ]
    rows = [sum(ranks, ()) for ranks in itertools.combinations_with_replacement(whole, costs.num_ranks)]
    placed = np.array([row for row in rows if len(set(row)) == len(load_E)])
    return float(predict_s_LR(np.tile(load_E, (len(placed), 1)), placed, costs).max(axis=1).min())


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "most_alike"),
    [(4, 2, 3, 1), (6, 3, 3, 1), (5, 4, 2, 1), (7, 3, 3, 1), (6, 6, 1, 1), (3, 2, 4, 2), (3, 3, 3, 2)],
)
def test_going_through_a_small_node_finds_the_fastest_placement(
    experts: int, ranks: int, slots: int, most_alike: int
) -> None:
    costs, limits = RankCosts.of_curves([CURVE] * ranks), Limits(slots, ranks, most_alike)
    for load_E in loads_of(4, experts):
        table = cost_table(costs, max_tokens=float(load_E.sum()), max_active=slots)
        found = fastest_apart(load_E, table, limits, np.inf, MANY_STEPS)
        assert found.steps > 0
        assert set(found.slot_S.tolist()) == set(range(experts))
        assert not shared_copies_L(found.slot_S[None], ranks, most_alike).any()
        found_s = predict_s_LR(load_E[None], found.slot_S[None], costs).max()
        assert found_s <= best_apart_s(load_E, costs, slots, most_alike) * (1 + 5e-4), "the table is within 2e-4"
        none = fastest_apart(load_E, table, limits, found.seconds * (1 - 1e-6), MANY_STEPS)
        assert (none.slot_S == -1).all(), "nothing is faster"


def test_going_through_ends_after_its_steps() -> None:
    costs, load_E = RankCosts.of_curves([CURVE] * 8), loads_of(1, 16)[0]
    table = cost_table(costs, max_tokens=float(load_E.sum()), max_active=3)
    assert fastest_apart(load_E, table, Limits(3, 8, 1), 0.0, 5000).steps == 0


def test_annealing_reaches_a_target_with_copies_apart() -> None:
    """From contiguous slots to within 2 % of an even share; the placement is whole, and the same each time."""
    ranks, slots, experts = 8, 3, 16
    costs, limits = RankCosts.of_curves([CURVE] * ranks), Limits(slots, ranks, 1)
    load_E = np.random.default_rng(0).uniform(100, 300, experts)
    table = cost_table(costs, max_tokens=float(load_E.sum()), max_active=slots)
    start_S = np.append(np.arange(16), np.arange(8)).reshape(3, 8).T.ravel()
    target_s = float(CURVE.seconds(load_E.sum() / ranks * 1.02, slots))
    assert predict_s_LR(load_E[None], start_S[None], costs).max() > 1.05 * target_s
    found_S, is_found, steps = anneal(load_E, np.zeros(experts, dtype=np.int64), start_S, table, limits, target_s)
    assert is_found
    assert steps > 0
    assert predict_s_LR(load_E[None], found_S[None], costs).max() <= target_s * (1 + 2e-4)
    assert set(found_S.tolist()) == set(range(experts))
    assert not shared_copies_L(found_S[None], ranks).any()
    again_S, _, _ = anneal(load_E, np.zeros(experts, dtype=np.int64), start_S, table, limits, target_s)
    np.testing.assert_array_equal(found_S, again_S)


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "most_shared"), [(8, 4, 3, 4), (12, 4, 6, 1), (16, 8, 3, 2), (128, 8, 17, 0)]
)
def test_hardly_a_layer_shares_where_the_token_balancer_does_in_most(
    experts: int, ranks: int, slots: int, most_shared: int
) -> None:
    load_LE, costs = loads_of(100, experts), RankCosts.of_curves([CURVE] * ranks)
    plan = place_on(PlacementRequest(load_LE=load_LE, num_ranks=ranks, slots_per_rank=slots), costs, expert_bytes=1)
    balanced_LS = balance_tokens(load_LE, num_slots=ranks * slots, num_ranks=ranks)
    assert np.count_nonzero(shared_copies_L(balanced_LS, ranks)) >= 40
    assert np.count_nonzero(shared_copies_L(plan.slot_to_expert_LS, ranks)) <= most_shared
    assert (plan.predicted_s_L <= predict_s_LR(load_LE, balanced_LS, costs).max(axis=1)).all()
