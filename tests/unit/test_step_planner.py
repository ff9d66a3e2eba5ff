"""Plans and divisions while a group runs: from costs, homes and passes as they are now."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poise.parallel.step_planner import NO_REPLICAS, Links, StepPlanner
from poise.plan.balance import BalancePlan
from poise.plan.observed_costs import ObservedCost, rank_costs
from tests.balance_cases import EXPERT_BYTES, LINK, TOKEN_BYTES, costs_of

LAYERS, RANKS, EXPERTS = 2, 4, 8
HOMES = np.tile(np.arange(EXPERTS), (LAYERS, 1))
ONES_R = np.ones(RANKS)
EXPERT_SENT_S = EXPERT_BYTES / LINK
WIDE_R = 9 * EXPERT_SENT_S * ONES_R
HOT_RE = np.tile([400, 300, 20, 20, 20, 20, 20, 20], (RANKS, 1))
"""Both hot experts are at home on rank 0."""


def planner(**changes: Any) -> StepPlanner:
    links = Links(bytes_per_s_R=LINK * ONES_R, token_bytes=round(TOKEN_BYTES), expert_bytes=round(EXPERT_BYTES))
    given = {"num_experts": EXPERTS, "replica_slots": 3, "most_work": 500, "costs": costs_of(ONES_R), **changes}
    return StepPlanner(given.pop("homes_LS", HOMES), links, **given)


def plan(planned: StepPlanner, counts_RE: np.ndarray = HOT_RE, *, layer: int = 0) -> BalancePlan:
    made = planned.plan(layer, counts_RE, WIDE_R, ONES_R, ONES_R)
    assert made is not None
    return made


def load_R(planned: StepPlanner, came_N3: np.ndarray, counts_RE: np.ndarray = HOT_RE, *, layer: int = 0) -> np.ndarray:
    """(Token, expert) pairs that each rank computes, by where every rank sends its own."""
    sent_R = np.zeros(RANKS, dtype=np.int64)
    for rank in range(RANKS):
        divided = planned.dispatch(layer, counts_RE, came_N3, ONES_R, ONES_R, rank=rank)
        assert divided is not None
        sent_R += divided[0].tokens_ER(RANKS).sum(axis=0)
    return sent_R


def home_pairs_R(planned: StepPlanner, *, layer: int = 0) -> np.ndarray:
    return np.array([planned.home_pairs(layer, HOT_RE, rank) for rank in range(RANKS)])


def sources(planned: BalancePlan) -> list[tuple[int, int]]:
    """Experts of which replicas come, and from where."""
    return [(replica.expert, replica.source) for replica in planned.replicas]


def test_replicas_of_the_hot_experts_even_the_ranks() -> None:
    made = planner()
    planned = plan(made)
    assert planned.pays
    assert set(sources(planned)) >= {(0, 0), (1, 0)}
    home_R = home_pairs_R(made)
    after_R = load_R(made, planned.replica_N3)
    assert after_R.sum() == home_R.sum() == HOT_RE.sum()
    assert home_R.max() > 3.0 * home_R.mean()
    assert after_R.max() < 1.2 * after_R.mean()


def test_without_costs_nothing_is_planned_and_tokens_go_home() -> None:
    made = planner(costs=None)
    assert made.plan(0, HOT_RE, WIDE_R, ONES_R, ONES_R) is None
    assert made.plan_exposed(0, HOT_RE, np.zeros(RANKS), ONES_R, ONES_R) is None
    assert made.dispatch(0, HOT_RE, NO_REPLICAS, ONES_R, ONES_R, rank=0) is None
    made.set_costs(costs_of(ONES_R))
    assert plan(made).pays
    made.set_costs(None)
    assert made.plan(0, HOT_RE, WIDE_R, ONES_R, ONES_R) is None


def test_new_costs_take_effect() -> None:
    """Rank 3 has become slow: what it would have helped with goes elsewhere."""
    made = planner()
    before_R = load_R(made, plan(made).replica_N3)
    made.set_costs(costs_of(np.array([1.0, 1.0, 1.0, 0.1])))
    slow = plan(made)
    after_R = load_R(made, slow.replica_N3)
    assert before_R[3] > 2 * 2 * 20 * RANKS
    assert after_R[3] < before_R[3] / 2
    expert_s, token_s = 20e-6, 0.25e-6
    made.set_costs(rank_costs([ObservedCost(expert_s=expert_s, token_s=token_s)] * RANKS))
    line = plan(made, HOT_RE, layer=1)
    assert line.unbalanced_s == pytest.approx(2 * expert_s + 700 * RANKS * token_s + 2 * TOKEN_BYTES / LINK * 700 * 3)


def test_new_homes_take_effect_in_their_layer_only() -> None:
    made = planner()
    plan(made, layer=0)
    plan(made, layer=1)
    made.set_homes(1, np.array([0, 2, 1, 3, 4, 5, 6, 7]))
    assert home_pairs_R(made).tolist() == [2800, 160, 160, 160]
    assert home_pairs_R(made, layer=1).tolist() == [1680, 1280, 160, 160]
    assert set(sources(plan(made, layer=0))) >= {(0, 0), (1, 0)}
    moved = plan(made, layer=1)
    assert set(sources(moved)) >= {(0, 0), (1, 1)}, "from where they are at home now"
    assert load_R(made, moved.replica_N3, layer=1).max() < 1.2 * HOT_RE.sum() / RANKS


def test_redundant_homes_share_and_need_no_replicas() -> None:
    """Expert 0 lies on ranks 0 and 3, expert 1 on ranks 0 and 2; rank 1 has one of its experts twice."""
    homes_S = np.array([0, 1, 1, 2, 3, 2, 4, 5, 1, 6, 7, 0])
    made = planner(homes_LS=np.tile(homes_S, (LAYERS, 1)))
    assert made.has_choice(0)
    np.testing.assert_array_equal(home_pairs_R(made), [800 + 600, 160, 160 + 600, 160 + 800])
    after_R = load_R(made, NO_REPLICAS)
    assert after_R.sum() == HOT_RE.sum()
    assert after_R.max() < 1400
    assert not planner().has_choice(0)
    assert planner().dispatch(0, HOT_RE, NO_REPLICAS, ONES_R, ONES_R, rank=0) is None, "no copy elsewhere"


FEW_RE = np.zeros((RANKS, EXPERTS), dtype=np.int64)
FEW_RE[0, :2] = 2
MANY_RE = np.tile([8000, 5000, 400, 400, 300, 300, 300, 300], (RANKS, 1))
assert FEW_RE.sum() == 4
assert MANY_RE.sum() == 60_000


@pytest.mark.parametrize(("first", "second"), [(FEW_RE, MANY_RE), (MANY_RE, FEW_RE)])
def test_passes_of_any_size_are_planned_as_if_there_were_no_others(first: np.ndarray, second: np.ndarray) -> None:
    made, fresh = planner(costs=costs_of(ONES_R, expert_s=1e-9)), planner(costs=costs_of(ONES_R, expert_s=1e-9))
    plan(made, first)
    after, alone = plan(made, second), plan(fresh, second)
    np.testing.assert_array_equal(after.replica_N3, alone.replica_N3)
    np.testing.assert_array_equal(after.assignment.tokens_ER(RANKS), alone.assignment.tokens_ER(RANKS))
    np.testing.assert_array_equal(after.predicted_s_R, alone.predicted_s_R)
    assert after.pays


def test_passes_of_any_size_are_planned_well_with_one_planner() -> None:
    """Where every token counts, two of four go to another rank, though a pass of 60,000 came before; and as well behind it."""
    made = planner(costs=costs_of(ONES_R, expert_s=1e-9))
    for _ in range(2):
        large, small = plan(made, MANY_RE), plan(made, FEW_RE)
        assert large.predicted_s < 1.1 * large.predicted_s_R.mean()
        assert small.pays
        assert small.assignment.tokens_ER(RANKS).sum(axis=0).max() < 4
    nothing = plan(made, np.zeros_like(FEW_RE))
    assert not nothing.pays
    assert not len(nothing.replica_N3)


def test_replicas_are_waited_for_only_where_that_pays() -> None:
    made = planner()
    free = made.plan_exposed(0, HOT_RE, np.zeros(RANKS), ONES_R, ONES_R)
    assert free is not None
    gain_s = free.unbalanced_s - free.predicted_s
    came = []
    for expert_s in np.linspace(0.0, 1.2 * gain_s, 13):
        exposed = made.plan_exposed(0, HOT_RE, expert_s * ONES_R, ONES_R, ONES_R)
        came.append(0 if exposed is None else len(exposed.replica_N3))
        if exposed is not None:
            moved_RR = exposed.transfers_RR
            wait_s = expert_s * max(moved_RR.sum(axis=0).max(), moved_RR.sum(axis=1).max())
            assert exposed.predicted_s + wait_s < exposed.unbalanced_s
    assert came == sorted(came, reverse=True), "the longer each takes, the fewer are waited for"
    assert came[0] > came[-2] == came[-1] == 0
    assert len(set(came)) > 2, "some are waited for where all are too many"
    slow_R = np.array([1.2 * gain_s, 0.0, 0.0, 0.0])
    assert made.plan_exposed(0, HOT_RE, slow_R, ONES_R, ONES_R) is None, "the source's link counts too"
    even_RE = np.full_like(HOT_RE, 50)
    assert made.plan_exposed(0, even_RE, np.zeros(RANKS), ONES_R, ONES_R) is None


def test_rehearsing_leaves_no_trace() -> None:
    made = planner(costs=None)
    made.rehearse()
    assert made.plan(0, HOT_RE, WIDE_R, ONES_R, ONES_R) is None
    known = planner()
    known.rehearse()
    np.testing.assert_array_equal(plan(known).predicted_s_R, plan(planner()).predicted_s_R)
