"""Noise never triggers, a real shift does soon: of routing, and of devices' speeds; then few moves put it right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.plan.placement import place_experts
from poise.predict.drift import (
    DriftRule,
    Hysteresis,
    RoutingDrift,
    SpeedDrift,
    cosine_distance_L,
    recalibrated,
    sampling_distance_L,
)
from poise.spec.curve import ClosedForm, Curve, Shape
from poise.spec.machine import Device, Machine

LAYERS, EXPERTS, RANKS = 4, 32, 4


def windows_of(rng: np.random.Generator, chance_LE: np.ndarray, tokens: int, count: int, alike: int) -> np.ndarray:
    """Counts of ``count`` windows. Tokens come in runs of ``alike`` equal ones, as text does: more noise, the same mean."""
    return np.stack([[rng.multinomial(tokens // alike, row) * alike for row in chance_LE] for _ in range(count)])


def chances(rng: np.random.Generator) -> np.ndarray:
    raw_LE = rng.lognormal(0.0, 1.0, (LAYERS, EXPERTS))
    return np.asarray(raw_LE / raw_LE.sum(axis=1, keepdims=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([200, 2000, 50_000]), st.sampled_from([1, 8]), st.booleans())
def test_routing_noise_never_triggers(seed: int, tokens: int, alike: int, one_window: bool) -> None:
    rng = np.random.default_rng(seed)
    chance_LE = chances(rng)
    profile_WLE = windows_of(rng, chance_LE, tokens, 8, 1 if one_window else alike)
    watch = RoutingDrift(profile_WLE[:1] if one_window else profile_WLE)
    for window_LE in windows_of(rng, chance_LE, tokens, 200, 1 if one_window else alike):
        assert not watch.observe(window_LE).drifted


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_a_shift_of_routing_triggers_once_and_soon(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before_LE = chances(rng)
    after_LE = 0.5 * before_LE + 0.5 * np.roll(before_LE, 7, axis=1)
    watch = RoutingDrift(windows_of(rng, before_LE, 20_000, 8, 4))
    assert not any(watch.observe(one).drifted for one in windows_of(rng, before_LE, 20_000, 20, 4))
    verdicts = [watch.observe(one).drifted for one in windows_of(rng, after_LE, 20_000, 40, 4)]
    assert verdicts.index(True) == 2, "in the third window"
    assert sum(verdicts) == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.001, 0.3), st.floats(0.5, 2.0))
def test_noise_of_times_and_a_change_that_all_share_never_trigger(seed: int, noise: float, common: float) -> None:
    rng = np.random.default_rng(seed)
    watch = SpeedDrift()
    for _ in range(200):
        predicted_NR = rng.uniform(1e-3, 2e-3, (64, RANKS))
        assert not watch.observe(predicted_NR, predicted_NR * common * rng.lognormal(0, noise, (64, RANKS))).drifted


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, RANKS - 1), st.sampled_from([0.7, 0.9, 1.2]))
def test_a_device_that_changes_its_speed_is_found_and_measured(seed: int, rank: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    watch = SpeedDrift()
    true_R = np.where(np.arange(RANKS) == rank, factor, 1.0)
    for window in range(3):
        predicted_NR = rng.uniform(1e-3, 2e-3, (64, RANKS))
        measured_NR = predicted_NR / true_R * rng.lognormal(0, 0.02, (64, RANKS))
        measured_NR[rng.integers(64)] *= 20.0  # something else ran on the machine
        verdict = watch.observe(predicted_NR, measured_NR)
        assert verdict.drifted == (window == 2)
    np.testing.assert_allclose(verdict.factor_R, true_R, rtol=0.02)


def test_few_moves_put_a_recalibrated_machine_right() -> None:
    shape = Shape(hidden=64, intermediate=32, dtype="bfloat16")
    curve = Curve(kind="expert", shape=shape, closed_form=ClosedForm(a_s=1e-5, b_s=1e-6, p=1.25))
    machine = Machine(
        devices=tuple(Device(name=f"gpu{rank}", memory_bytes=1, curves=(curve,)) for rank in range(RANKS))
    )
    load_LE = chances(np.random.default_rng(0)) * 10_000
    before = place_experts(load_LE, machine, slots_per_rank=9)
    slower = recalibrated(machine, [1.0, 0.8, 1.0, 1.0])
    assert [device.speed for device in slower.devices] == [1.0, 0.8, 1.0, 1.0]
    anew = place_experts(load_LE, slower, slots_per_rank=9)
    repaired = place_experts(load_LE, slower, slots_per_rank=9, current=before.slot_to_expert_LS)
    assert repaired.current_s_L is not None
    assert (repaired.current_s_L > 1.1 * anew.predicted_s_L).all()
    assert (repaired.predicted_s_L <= 1.0101 * anew.predicted_s_L).all()
    assert repaired.moves is not None
    assert len(repaired.moves) <= 12 * LAYERS, "of 36 slots in each layer"


def test_hysteresis_waits_until_it_was_quiet() -> None:
    gate = Hysteresis(DriftRule(limit=1.0, noise_factor=1.0, windows=2))
    values = [2, 0.9, 2, 2, 2, 2, 0.9, 2, 2, 0.4, 2, 2]
    assert [gate.passed(value, 1.0) for value in values] == [False] * 3 + [True] + [False] * 7 + [True]


def test_the_expected_distance_of_samples_is_what_samples_have() -> None:
    rng = np.random.default_rng(1)
    chance_LE = chances(rng)
    drawn = windows_of(rng, chance_LE, 5000, 50, 1).astype(float)
    measured_L = np.mean([cosine_distance_L(one, chance_LE) for one in drawn], axis=0)
    expected_L = sampling_distance_L(chance_LE * 1e12, np.full(LAYERS, 5000.0))
    assert (measured_L / expected_L).mean() == pytest.approx(0.85, abs=0.15)
