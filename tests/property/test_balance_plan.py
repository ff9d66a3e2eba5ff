"""The balance planner: what every plan keeps, whatever the counts, curves, slots and windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.plan.balance import BalancePlan, Strategy
from poise.plan.balance_assignment import dispatch_of, tokens_to
from poise.plan.balance_call import WORTH_FRAC
from tests.balance_cases import EXPERT_BYTES, LINK, balancer, seconds_R


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """``copies``: further home slots of each rank, which hold any experts."""

    counts_RE: np.ndarray
    speed_R: np.ndarray
    slots_S: np.ndarray
    window_s_R: np.ndarray
    replica_slots: int
    strategy: Strategy
    copy_s: float

    @property
    def num_ranks(self) -> int:
        return len(self.counts_RE)

    @property
    def holds_ER(self) -> np.ndarray:
        experts = self.counts_RE.shape[1]
        slots_RS = self.slots_S.reshape(self.num_ranks, -1)
        return (slots_RS[None] == np.arange(experts)[:, None, None]).any(axis=2)

    def plan(self) -> BalancePlan:
        return balancer(
            self.speed_R,
            self.counts_RE.shape[1],
            slots_S=self.slots_S,
            strategy=self.strategy,
            replica_slots=self.replica_slots,
            most_tokens=float(self.counts_RE.sum()),
        ).choose_replicas(self.counts_RE, self.window_s_R, copy_s_R=np.full(self.num_ranks, self.copy_s))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.integers(2, 8))
    experts = ranks * draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share_E = rng.permutation(1.0 / np.arange(1, experts + 1) ** draw(st.floats(0.0, 2.0)))
    tokens = draw(st.sampled_from([0.0, 0.3, 5.0, 400.0]))
    counts_RE = rng.poisson(tokens * experts * share_E / share_E.sum(), (ranks, experts))
    slots_RS = np.arange(experts).reshape(ranks, -1)
    if draw(st.booleans()):
        slots_RS = np.hstack([slots_RS, rng.integers(0, experts, (ranks, 1))])
    return Case(
        counts_RE=counts_RE.astype(draw(st.sampled_from([np.int32, np.int64]))),
        speed_R=rng.uniform(0.6, 1.0, ranks) if draw(st.booleans()) else np.ones(ranks),
        slots_S=slots_RS.ravel(),
        window_s_R=rng.choice([0.0, 1.5, 2.5, 9.0], ranks) * EXPERT_BYTES / LINK,
        replica_slots=draw(st.integers(0, 4)),
        strategy=draw(st.sampled_from(["quota", "greedy"])),
        copy_s=draw(st.sampled_from([0.0, 0.0, 2e-6, 50e-6])),
    )


@settings(deadline=None, max_examples=200)
@given(case=cases())
def test_a_plan_keeps_every_token_and_every_limit(case: Case) -> None:
    plan = case.plan()
    tokens_ER = plan.assignment.tokens_ER(case.num_ranks)
    np.testing.assert_array_equal(tokens_ER.sum(axis=1), case.counts_RE.sum(axis=0))
    assert tokens_ER.min() >= 0
    home_ER, holds_ER = case.holds_ER, case.holds_ER
    for replica in plan.replicas:
        assert home_ER[replica.expert, replica.source], "a replica comes from where the expert is at home"
        assert not holds_ER[replica.expert, replica.target], "a second copy on one rank"
        holds_ER[replica.expert, replica.target] = True
        assert tokens_ER[replica.expert, replica.target] > 0, "a replica without tokens"
    assert not (tokens_ER > 0)[~holds_ER].any(), "tokens where no copy is"
    hidden_R = (case.window_s_R * LINK / EXPERT_BYTES + 1e-9).astype(int)
    assert (plan.transfers_RR.sum(axis=0) <= np.minimum(case.replica_slots, hidden_R)).all(), "slots and windows in"
    assert (plan.transfers_RR.sum(axis=1) <= hidden_R).all(), "windows out"
    assert plan.predicted_s <= plan.unbalanced_s * (1 + 1e-9)
    assert plan.pays == bool(plan.replicas)
    assert not plan.pays or plan.predicted_s <= (1.0 - WORTH_FRAC) * plan.unbalanced_s, "replicas that do not pay"


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_predicted_times_are_those_of_the_cost_model(case: Case) -> None:
    plan = case.plan()
    tokens_ER = plan.assignment.tokens_ER(case.num_ranks)
    truth_R = seconds_R(case.counts_RE, tokens_ER, case.speed_R)
    truth_R += case.copy_s * (plan.transfers_RR.sum(axis=0) + plan.transfers_RR.sum(axis=1))
    a_token_s = 2e-6 * tokens_ER.shape[0]  # quotas are made whole behind the prediction
    np.testing.assert_allclose(plan.predicted_s_R, truth_R, rtol=3e-3, atol=a_token_s)


@settings(deadline=None, max_examples=60)
@given(case=cases(), seed=st.integers(0, 1000), lost=st.booleans())
def test_true_tokens_go_to_the_copies_that_are_there(case: Case, seed: int, lost: bool) -> None:
    rng = np.random.default_rng(seed)
    both = balancer(case.speed_R, case.counts_RE.shape[1], slots_S=case.slots_S, replica_slots=case.replica_slots)
    replica_N3 = both.choose_replicas(case.counts_RE, case.window_s_R).replica_N3
    if lost:
        replica_N3 = replica_N3[rng.random(len(replica_N3)) < 0.5]
    true_RE = rng.poisson(case.counts_RE).astype(case.counts_RE.dtype)
    plan = both.divide(true_RE, replica_N3)
    tokens_ER, holds_ER = plan.assignment.tokens_ER(case.num_ranks), case.holds_ER
    holds_ER[replica_N3[:, 0], replica_N3[:, 2]] = True
    np.testing.assert_array_equal(tokens_ER.sum(axis=1), true_RE.sum(axis=0))
    assert not (tokens_ER > 0)[~holds_ER].any()
    assert not plan.replicas
    assert plan.predicted_s <= plan.unbalanced_s * (1 + 1e-9)


@settings(deadline=None, max_examples=80)
@given(case=cases(), least=st.sampled_from([1, 4, 8, 32, 1000]), seed=st.integers(0, 1000))
def test_a_copy_computes_nothing_or_the_least_that_is_worth_it(case: Case, least: int, seed: int) -> None:
    """Unless no other has any of the expert's tokens. Homes with redundant experts may share evenly instead."""
    experts = case.counts_RE.shape[1]
    one = balancer(case.speed_R, experts, replica_slots=case.replica_slots, least_tokens=least, least_active=0.0)
    planned = one.choose_replicas(case.counts_RE, case.window_s_R)
    true_RE = np.random.default_rng(seed).poisson(case.counts_RE).astype(case.counts_RE.dtype)
    for plan in (planned, one.divide(true_RE, planned.replica_N3)):
        tokens_ER = plan.assignment.tokens_ER(case.num_ranks)
        shared_ER = tokens_ER[np.count_nonzero(tokens_ER, axis=1) > 1]
        assert (shared_ER[shared_ER > 0] > least - 1).all(), "whole tokens differ by less than one from their shares"


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_every_rank_knows_where_its_tokens_go(case: Case) -> None:
    assignment, ranks = case.plan().assignment, case.num_ranks
    tokens_ER = assignment.tokens_ER(ranks)
    sent_SER = np.stack([dispatch_of(assignment, case.counts_RE, rank).tokens_ER(ranks) for rank in range(ranks)])
    np.testing.assert_array_equal(sent_SER.sum(axis=0), tokens_ER)
    np.testing.assert_array_equal(sent_SER.sum(axis=2), case.counts_RE)
    stay_RE = np.einsum("rer->re", sent_SER)
    np.testing.assert_array_equal(stay_RE, np.minimum(case.counts_RE, tokens_ER.T), err_msg="those born there first")
    for target in range(ranks):
        np.testing.assert_array_equal(tokens_to(assignment, case.counts_RE, target), sent_SER[:, :, target].sum(axis=1))


@settings(deadline=None, max_examples=60)
@given(case=cases(), seed=st.integers(0, 1000))
def test_true_tokens_follow_predicted_shares(case: Case, seed: int) -> None:
    assignment, ranks = case.plan().assignment, case.num_ranks
    own_E = np.random.default_rng(seed).poisson(2 * case.counts_RE[0])
    sent_ER = dispatch_of(assignment, case.counts_RE, 0, own_E).tokens_ER(ranks)
    np.testing.assert_array_equal(sent_ER.sum(axis=1), own_E)
    counted_ER = dispatch_of(assignment, case.counts_RE, 0).tokens_ER(ranks)
    seen_E = case.counts_RE[0] > 0
    share_ER = counted_ER[seen_E] / case.counts_RE[0][seen_E][:, None]
    assert np.abs(sent_ER[seen_E] - share_ER * own_E[seen_E][:, None]).max(initial=0.0) <= 1.0
    holds_ER = np.zeros_like(sent_ER, dtype=bool)
    holds_ER[assignment.expert_N, assignment.rank_N] = True
    assert not (sent_ER > 0)[~holds_ER].any()
