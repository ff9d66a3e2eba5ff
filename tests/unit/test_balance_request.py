"""A step planned from a machine file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from poise.errors import MachineError, PlacementError
from poise.plan import balance_step
from poise.spec.bundled import find_machine
from poise.spec.curve import Shape

SHAPE = Shape(hidden=4096, intermediate=1536, dtype="bfloat16")
BYTES = {"expert_bytes": 3 * 4096 * 1536 * 2, "token_bytes": 4096 * 2}


def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(60 * rng.lognormal(0.0, 1.0, 128), (8, 128))


def test_a_bundled_machine_is_enough() -> None:
    plan = balance_step(counts(), np.arange(128), find_machine("h200"), window_s_R=1e-3, shape=SHAPE, **BYTES)
    assert plan.replicas
    assert plan.predicted_s < 0.95 * plan.unbalanced_s
    assert plan.transfers_RR.sum() == len(plan.replicas)


def test_both_strategies_plan_and_others_are_refused() -> None:
    given = (counts(), np.arange(128), find_machine("h200"))
    options = {"window_s_R": 1e-3, "shape": SHAPE, **BYTES}
    ours, papers = (balance_step(*given, **options, strategy=name) for name in ("quota", "greedy"))
    for plan in (ours, papers):
        assert plan.replicas
        assert plan.predicted_s < 0.95 * plan.unbalanced_s
    assert ours.predicted_s != papers.predicted_s
    with pytest.raises(PlacementError, match="choose from: quota, greedy"):
        balance_step(*given, **options, strategy="lucky")


def test_tokens_that_travel_once_take_less_time() -> None:
    counts_RE = counts()
    home_RR = counts_RE.reshape(8, 8, 16).sum(axis=2)
    machine = find_machine("h200")
    options = {"window_s_R": 0.0, "shape": SHAPE, **BYTES}
    plain = balance_step(counts_RE, np.arange(128), machine, **options)
    same = balance_step(counts_RE, np.arange(128), machine, unique_tokens_RR=home_RR, **options)
    once = balance_step(counts_RE, np.arange(128), machine, unique_tokens_RR=0.5 * home_RR, **options)
    assert same.predicted_s == pytest.approx(plain.predicted_s)
    assert once.predicted_s < plain.predicted_s


def test_what_does_not_go_together_is_refused() -> None:
    machine = find_machine("h200")
    options = {"window_s_R": 0.0, "shape": SHAPE, **BYTES}
    with pytest.raises(PlacementError, match="whole numbers"):
        balance_step(counts() * 0.5, np.arange(128), machine, **options)
    with pytest.raises(PlacementError, match="unique_tokens_RR"):
        balance_step(counts(), np.arange(128), machine, unique_tokens_RR=np.ones((2, 2)), **options)
    with pytest.raises(MachineError, match="no link"):
        balance_step(counts(), np.arange(128), replace(machine, links=()), **options)
