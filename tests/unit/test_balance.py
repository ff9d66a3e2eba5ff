"""The balance planner on steps whose answer is plain."""

from __future__ import annotations

import numpy as np
import pytest

from poise.errors import PlacementError
from poise.plan.balance import STRATEGIES, Balancer, Strategy
from poise.plan.balance_assignment import dispatch_of
from poise.plan.observed_costs import ObservedCost, rank_costs
from tests.balance_cases import EXPERT_BYTES, LINK, balancer


def skewed(ranks: int, experts: int, *, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    share_E = rng.permutation(1.0 / np.arange(1, experts + 1) ** 1.2)
    return rng.poisson(500 * experts * share_E / share_E.sum(), (ranks, experts))


def windows(ranks: int, experts: float) -> np.ndarray:
    """In which so many experts can be sent."""
    return np.full(ranks, (experts + 0.5) * EXPERT_BYTES / LINK)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_counts_give_the_same_plan_again_and_elsewhere(strategy: Strategy) -> None:
    counts_RE, window_s_R = skewed(8, 64), windows(8, 3)
    one, other = balancer(np.ones(8), 64, strategy=strategy), balancer(np.ones(8), 64, strategy=strategy)
    first = one.choose_replicas(counts_RE, window_s_R)
    one.choose_replicas(skewed(8, 64, seed=2), window_s_R)
    for plan in (one.choose_replicas(counts_RE, window_s_R), other.choose_replicas(counts_RE, window_s_R)):
        np.testing.assert_array_equal(first.replica_N3, plan.replica_N3)
        np.testing.assert_array_equal(first.assignment.tokens_N, plan.assignment.tokens_N)
        np.testing.assert_array_equal(first.predicted_s_R, plan.predicted_s_R)


def test_balanced_input_is_left_alone_and_counted() -> None:
    one = balancer(np.ones(4), 16, token_bytes=1.0)
    plan = one.choose_replicas(np.full((4, 16), 50), windows(4, 3))
    assert not plan.replicas
    assert plan.predicted_s == plan.unbalanced_s
    one.choose_replicas(skewed(4, 16), windows(4, 3))
    assert (one.planned, one.declined) == (2, 1)


def test_no_tokens_no_replicas() -> None:
    plan = balancer(np.ones(4), 16).choose_replicas(np.zeros((4, 16), dtype=np.int64), windows(4, 3))
    assert not plan.replicas
    assert plan.predicted_s == 0.0
    assert plan.assignment.tokens_N.sum() == 0


def test_a_slow_rank_is_relieved_though_tokens_are_equal() -> None:
    speed_R = np.array([1.0, 1.0, 1.0, 0.5])
    plan = balancer(speed_R, 16, token_bytes=1.0).choose_replicas(np.full((4, 16), 500), windows(4, 4))
    assert plan.predicted_s < 0.75 * plan.unbalanced_s
    assert {replica.source for replica in plan.replicas} == {3}


def test_a_replica_that_takes_more_processor_time_than_it_saves_does_not_come() -> None:
    """Two ranks that are nearly even: somewhat may be had, if copies take no time of theirs."""
    counts_RE = np.tile([300, 260, 250, 250, 240, 240, 230, 210], (2, 1))
    one = balancer(np.ones(2), 8)
    free = one.choose_replicas(counts_RE, windows(2, 3))
    gain_s = free.unbalanced_s - free.predicted_s
    assert free.replicas
    cheap = one.choose_replicas(counts_RE, windows(2, 3), copy_s_R=np.full(2, gain_s / 20))
    assert cheap.replicas
    assert free.predicted_s < cheap.predicted_s < cheap.unbalanced_s
    for copy_s_R in ([gain_s, gain_s], [0.0, 2.5 * gain_s], [2.5 * gain_s, 0.0]):
        dear = one.choose_replicas(counts_RE, windows(2, 3), copy_s_R=np.array(copy_s_R))
        assert not dear.replicas, copy_s_R
        assert dear.predicted_s == dear.unbalanced_s


def test_copies_go_where_they_cost_nothing() -> None:
    """Rank 1 has no copy engine, ranks 2 and 3 have."""
    counts_RE = np.tile([600, 600, 50, 50, 50, 50, 50, 50], (4, 1))
    copy_s_R = np.array([0.0, 1e-3, 0.0, 0.0])
    plan = balancer(np.ones(4), 8).choose_replicas(counts_RE, windows(4, 3), copy_s_R=copy_s_R)
    assert {replica.target for replica in plan.replicas} == {2, 3}


def test_ours_is_faster_than_the_greedy_search() -> None:
    counts_RE, window_s_R = skewed(8, 64), windows(8, 3)
    ours, greedy = (
        balancer(np.ones(8), 64, strategy=strategy).choose_replicas(counts_RE, window_s_R) for strategy in STRATEGIES
    )
    assert ours.predicted_s < 0.8 * greedy.predicted_s < 0.8 * greedy.unbalanced_s


def test_experts_go_where_their_tokens_are_born() -> None:
    """Ranks are balanced, but each asks for the other's expert alone: to exchange them saves all that travels."""
    counts_RE = np.array([[0, 1000], [1000, 0]])
    plan = balancer(np.ones(2), 2, replica_slots=1).choose_replicas(counts_RE, windows(2, 1))
    np.testing.assert_array_equal(plan.assignment.tokens_ER(2), [[0, 1000], [1000, 0]])
    assert {(replica.expert, replica.target) for replica in plan.replicas} == {(0, 1), (1, 0)}


def test_memory_bound_steps_balance_active_experts() -> None:
    """Where weights are all that costs, a rank with more active experts gives some away whole."""
    counts_RE = np.zeros((2, 8), dtype=np.int64)
    counts_RE[:, :4] = 1
    plan = balancer(np.ones(2), 8, replica_slots=2, token_bytes=1e-3).choose_replicas(counts_RE, windows(2, 2))
    active_R = (plan.assignment.tokens_ER(2) > 0).sum(axis=0)
    np.testing.assert_array_equal(active_R, [2, 2])


@pytest.mark.parametrize(("least", "shared"), [(1.0, 20), (16.0, 20), (32.0, 32), (48.0, 0), (1000.0, 0)])
def test_a_share_below_the_least_becomes_none_or_the_least(least: float, shared: int) -> None:
    """Rank 0 is later than rank 1 by an active expert and 40 tokens: to be even, 20 would go."""
    counts_RE = np.zeros((3, 6), dtype=np.int64)
    a_token_s, an_expert_s = 1e-6, 100e-6
    counts_RE[2, :4] = 440, 100, 400, 100
    made = Balancer(
        rank_costs([ObservedCost(expert_s=an_expert_s, token_s=a_token_s)] * 3),
        np.array([0, 1, 2, 3, 4, 5]),
        num_experts=6,
        link_bytes_per_s_R=1e12,
        token_bytes=1.0,
        expert_bytes=1.0,
        most_tokens=2000.0,
        least_tokens=least,
        least_active=0.0,
    )
    counts_RE[2, 0] += 100
    tokens_ER = made.divide(counts_RE, np.array([[0, 0, 1]])).assignment.tokens_ER(3)
    assert tokens_ER[0, 1] == pytest.approx(shared, abs=1)
    assert tokens_ER[0].sum() == counts_RE[2, 0]


def test_memory_bound_experts_are_on_one_copy_each() -> None:
    """The least follows from the curve: where a token costs next to nothing, no expert is worth a second copy."""
    counts_RE = np.random.default_rng(3).poisson(3.0, (4, 16)) + 1
    came_N3 = np.array([[expert, expert // 4, (expert // 4 + 1) % 4] for expert in range(0, 16, 2)])
    for least_active, most in ((0.0, 17), (0.25, 16)):
        one = balancer(np.ones(4), 16, expert_s=1e-3, token_bytes=1e-3, least_active=least_active)
        active = int((one.divide(counts_RE, came_N3).assignment.tokens_N > 0).sum())
        assert 16 <= active <= most


def test_tokens_go_to_their_own_rank_first_and_then_in_order() -> None:
    counts_RE = np.array([[10, 0], [4, 0], [6, 0]])
    one = balancer(np.ones(3), 2, slots_S=[0, 0, 1], replica_slots=0, token_bytes=1e-6)
    assignment = one.divide(counts_RE, np.zeros((0, 3), dtype=np.int64)).assignment
    assert assignment.tokens_N.tolist() == [10, 10, 0]
    assert dispatch_of(assignment, counts_RE, 0).tokens_ER(3).tolist() == [[10, 0, 0], [0, 0, 0]]
    assert dispatch_of(assignment, counts_RE, 2).tokens_ER(3).tolist() == [[0, 6, 0], [0, 0, 0]]


def test_replicas_that_cannot_be_there_are_an_error_and_doubles_are_one() -> None:
    counts_RE = skewed(2, 4)
    one = balancer(np.ones(2), 4, replica_slots=1)
    once, twice = (
        one.divide(counts_RE, np.array(copies)) for copies in ([[0, 0, 1]], [[0, 0, 1], [0, 0, 1], [2, 1, 1]])
    )
    assert 0 < twice.assignment.tokens_ER(2)[0, 1] < counts_RE[:, 0].sum()
    np.testing.assert_array_equal(once.assignment.tokens_ER(2), twice.assignment.tokens_ER(2))
    with pytest.raises(AssertionError, match="more replicas"):
        balancer(np.ones(2), 4, replica_slots=1).divide(
            np.ones((2, 4), dtype=np.int32), np.array([[0, 0, 1], [1, 0, 1]])
        )


@pytest.mark.parametrize(
    ("slots", "message"),
    [([0, 1, 2, 2], r"missing: \[3\]"), ([0, 1, 2], "multiple"), ([0, 1, 2, 3, 4, 4], "0 to 3"), ([], "multiple")],
)
def test_homes_that_are_none_are_refused(slots: list[int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        balancer(np.ones(2), 4, slots_S=np.array(slots, dtype=np.int64))


def test_strategies_and_slots_that_are_none_are_refused() -> None:
    with pytest.raises(PlacementError, match="quota, greedy"):
        balancer(np.ones(2), 4, strategy="best")  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="-1 replica slots"):
        balancer(np.ones(2), 4, replica_slots=-1)
