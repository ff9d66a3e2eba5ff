"""What plans have promised and true tokens have brought, as a share that falls and comes back."""

from __future__ import annotations

import numpy as np
import pytest

from poise.parallel.plan_trust import BELIEVED, KEEP, LEAST_PERMILLE, PlanTrust, promised_s
from poise.plan.balance import BalancePlan
from poise.plan.balance_assignment import Assignment

NOTHING = Assignment(begin_E1=np.zeros(1, int), rank_N=np.zeros(0, int), tokens_N=np.zeros(0, int))


def plan_of(predicted_s_R: list[float], *, pays: bool = True) -> BalancePlan:
    """Rank 0 gives two replicas, to ranks 1 and 2."""
    replicas = np.array([[5, 0, 1], [6, 0, 2]])
    return BalancePlan(
        replica_N3=replicas,
        assignment=NOTHING,
        predicted_s_R=np.array(predicted_s_R),
        unbalanced_s=10.0,
        pays=pays,
    )


def test_before_anything_was_promised_plans_are_believed() -> None:
    assert PlanTrust().permille == 1000


def test_one_broken_promise_is_forgiven_and_many_are_not() -> None:
    """The first replicas of a run often come too late."""
    trust = PlanTrust()
    trust.saw(4.0, 0.0)
    first = KEEP * BELIEVED / (KEEP * BELIEVED + 1.0)
    assert trust.permille == round(1000 * first)
    assert first > 0.7
    for _ in range(100):
        trust.saw(4.0, -3.0)
    assert trust.permille == LEAST_PERMILLE
    for _ in range(100):
        trust.saw(1.0, 2.0)
    assert trust.permille == 1000


def test_it_comes_to_the_share_that_is_kept() -> None:
    trust = PlanTrust()
    for _ in range(200):
        trust.saw(4.0, 1.0)
    assert trust.permille == 250


def test_who_kept_nothing_is_tried_again_some_time() -> None:
    trust = PlanTrust()
    for _ in range(200):
        trust.saw(4.0, 0.0)
    layers = 0
    while trust.permille < 500:
        trust.saw(0.0, 0.0)
        layers += 1
        assert layers < 1000
    assert layers > 100, "a quiet minute makes nobody honest"


def test_a_promise_is_the_gain_without_what_copies_take() -> None:
    copy_s_R = np.array([1.0, 0.5, 0.25])
    assert promised_s(plan_of([7.0, 6.0, 5.0]), copy_s_R) == pytest.approx(10.0 - 5.5)
    assert promised_s(plan_of([7.0, 6.0, 5.0]), np.zeros(3)) == pytest.approx(3.0)
    assert promised_s(plan_of([7.0, 6.0, 5.0], pays=False), copy_s_R) == 0.0
    assert promised_s(None, copy_s_R) == 0.0
