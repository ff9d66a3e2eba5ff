"""What ranks cost as seen in noise, how long the slowest takes, and EPLB by the clock. ViBE: tests/property/test_vibe.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from poise.plan.observed_costs import ObservedCost, Times, fit, observe, observed_costs, rank_costs
from poise.plan.placement import predict_s_LR
from poise.plan.rank_costs import RankCosts
from poise.plan.rebalance import Eplb, Window
from poise.plan.slowest import expected_slowest_s_L, mean_of_largest_L

FAST, SLOW = ObservedCost(expert_s=1e-4, token_s=1e-6), ObservedCost(expert_s=2e-4, token_s=2e-6)
CONTIGUOUS = np.tile(np.arange(8), (2, 1))


def times(costs: list[ObservedCost | None], rows: int = 20, scatter: float = 0.0, seed: int = 0) -> Times:
    rng = np.random.default_rng(seed)
    tokens_NR, active_NR = (rng.integers(*span, (rows, len(costs))).astype(float) for span in ((200, 2000), (1, 5)))
    for rank, cost in enumerate(costs):
        if cost is None:
            tokens_NR[:, rank] = active_NR[:, rank] = 0
    seconds_NR = np.stack(
        [
            (each or FAST).seconds(tokens, active)
            for each, tokens, active in zip(costs, tokens_NR.T, active_NR.T, strict=True)
        ],
        axis=1,
    )
    seconds_NR *= np.exp(scatter * rng.normal(size=seconds_NR.shape))
    return Times(tokens_NR=tokens_NR, active_NR=active_NR, seconds_NR=seconds_NR)


def test_the_line_is_found_in_noise_and_in_spite_of_hold_ups() -> None:
    rng = np.random.default_rng(0)
    tokens, active = rng.integers(1, 4000, 400), rng.integers(1, 16, 400)
    seconds = (active * 3e-4 + tokens * 2e-6) * rng.normal(1.0, 0.1, 400)
    seconds[::40] *= 20
    found = fit(tokens, active, seconds)
    assert found is not None
    assert found.expert_s == pytest.approx(3e-4, rel=0.15)
    assert found.token_s == pytest.approx(2e-6, rel=0.15)


def test_a_line_is_never_negative_and_nothing_seen_is_nothing_known() -> None:
    assert fit([0, 0], [0, 0], [0.0, 0.0]) is None
    assert fit([], [], []) is None
    tokens = np.array([100, 200, 400])
    found = fit(tokens, [4, 3, 1], 1e-6 * tokens)
    assert found is not None
    assert found.expert_s == pytest.approx(0.0, abs=1e-9)
    assert found.token_s == pytest.approx(1e-6)


def test_a_rank_that_was_idle_is_taken_for_an_ordinary_one() -> None:
    costs = rank_costs([FAST, None, SLOW])
    assert costs is not None
    seconds_R = costs.seconds_LR(np.full((1, 3), 500.0), np.full((1, 3), 2.0))[0]
    assert seconds_R.tolist() == pytest.approx([7e-4, 10.5e-4, 14e-4])
    assert rank_costs([None, None]) is None
    seen = observe([times([FAST, None, SLOW])])
    assert seen is not None
    seconds_R = seen.costs.seconds_LR(np.full((1, 3), 500.0), np.full((1, 3), 2.0))[0]
    assert seconds_R[[0, 2]].tolist() == pytest.approx([7e-4, 14e-4], rel=0.01)
    assert seconds_R[0] < seconds_R[1] < seconds_R[2]
    assert observe([times([None, None])]) is None


def test_a_rank_whose_load_is_steady_has_the_shape_of_the_others() -> None:
    """One number of tokens and experts says nothing of which of them costs what."""
    seen_by = times([FAST, SLOW], rows=200, scatter=0.1)
    seen_by.tokens_NR[:, 1], seen_by.active_NR[:, 1] = 500.0, 3.0
    seen_by.seconds_NR[:, 1] = SLOW.seconds(500, 3) * np.exp(0.1 * np.random.default_rng(1).normal(size=200))
    seen = observe([seen_by])
    assert seen is not None
    for tokens, active in ((500.0, 3.0), (2000.0, 1.0), (100.0, 8.0)):
        found = seen.costs.seconds_LR(np.full((1, 2), tokens), np.full((1, 2), active))[0, 1]
        assert found == pytest.approx(SLOW.seconds(tokens, active), rel=0.1)


def test_a_common_line_and_paces_are_found_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [times([FAST, SLOW, FAST], scatter=0.5, seed=seed) for seed in range(4)]
    grid = np.full((1, 3), 700.0), np.full((1, 3), 2.0)
    found = [costs.seconds_LR(*grid) for costs in (observed_costs(windows),) if costs is not None]
    monkeypatch.setattr("poise.plan.observed_costs.MOST_ROUNDS", 5)
    found += [costs.seconds_LR(*grid) for costs in (observed_costs(windows),) if costs is not None]
    np.testing.assert_array_equal(*found, "more than five are allowed, and change nothing")
    np.testing.assert_allclose(found[0], [[9e-4, 18e-4, 9e-4]], rtol=0.3)


@pytest.mark.parametrize("curves", [None, rank_costs([FAST, FAST])])
def test_costs_alone_are_those_that_come_with_errors(curves: RankCosts | None) -> None:
    windows = [times([FAST, SLOW], rows=rows, scatter=0.2, seed=rows) for rows in (3, 4, 5)]
    windows[0].tokens_NR[0, 0] = 0.0
    windows[1].seconds_NR[2, 1] *= 20  # held up
    seen, alone = observe(windows, curves), observed_costs(windows, curves)
    assert seen is not None
    assert alone is not None
    grid = np.array([[100.0, 900.0]]), np.array([[2.0, 3.0]])
    np.testing.assert_array_equal(alone.seconds_LR(*grid), seen.costs.seconds_LR(*grid))
    np.testing.assert_allclose(alone.seconds_LR(*grid), [[3e-4, 2.4e-3]], rtol=0.2)
    assert observed_costs([], curves) is None


def test_measured_curves_keep_their_shape_at_the_pace_that_is_seen() -> None:
    curves = rank_costs([FAST, FAST])
    assert curves is not None
    seen = observe([times([FAST, SLOW], scatter=0.05, seed=seed) for seed in range(4)], curves)
    assert seen is not None
    assert seen.costs.speed_R.tolist() == pytest.approx([1.0, 0.5], rel=0.03)
    assert seen.scatter_R.tolist() == pytest.approx([0.05, 0.05], rel=0.4)
    assert (seen.error_R < 0.03).all()


def test_the_slowest_of_ranks_that_are_even_on_average_is_slower_than_they_are() -> None:
    rng = np.random.default_rng(0)
    mean_LR, deviation_LR = rng.uniform(1, 1.5, (6, 4)), rng.uniform(0, 0.3, (6, 4))
    drawn = (mean_LR + deviation_LR * rng.normal(size=(50_000, 6, 4))).max(axis=2).mean(axis=0)
    np.testing.assert_allclose(mean_of_largest_L(mean_LR, deviation_LR), drawn, rtol=3e-3)
    np.testing.assert_allclose(mean_of_largest_L(mean_LR, np.zeros((6, 4))), mean_LR.max(axis=1))


def test_the_expected_slowest_is_what_steps_of_few_tokens_show() -> None:
    """48 tokens over 8 experts on two ranks, drawn one by one."""
    rng = np.random.default_rng(0)
    chance_E = np.array([3, 2, 1, 1, 1, 2, 3, 1]) / 14.0
    count_NE = rng.poisson(48 * chance_E, (20_000, 8)).reshape(-1, 2, 4)
    seconds_NR = (count_NE > 0).sum(axis=2) * FAST.expert_s + count_NE.sum(axis=2) * 3e-5
    costs = rank_costs([replace(FAST, token_s=3e-5)] * 2)
    assert costs is not None
    found = expected_slowest_s_L(48 * chance_E[None], CONTIGUOUS[:1], costs, np.zeros(2))
    assert found[0] == pytest.approx(seconds_NR.max(axis=1).mean(), rel=0.01)
    assert found[0] > 1.03 * predict_s_LR(48 * chance_E[None], CONTIGUOUS[:1], costs).max()


def window(load_E: list[float], costs: list[ObservedCost | None], current_LS: np.ndarray = CONTIGUOUS) -> Window:
    return Window(load_LE=np.tile(load_E, (2, 1)) * 10.0, steps=10, times=times(costs), current_LS=current_LS)


def test_eplb_balances_tokens_and_does_not_see_speeds() -> None:
    load = [800.0, 700, 600, 500, 400, 300, 200, 100]
    one, other = (Eplb().start(None).propose(window(load, costs)) for costs in ([SLOW, FAST], [FAST, SLOW]))
    assert one is not None
    assert other is not None
    assert np.array_equal(one.slot_to_expert_LS, other.slot_to_expert_LS)
    rank_loads = np.array(load)[one.slot_to_expert_LS].reshape(2, 2, 4).sum(axis=2)
    assert (rank_loads == 1800).all()
    assert one.gain_frac is not None
    assert other.gain_frac is not None
    assert one.gain_frac > other.gain_frac, "the slow rank had the hot experts, or the light ones"
    assert Eplb().start(None).propose(window(load, [SLOW, FAST], one.slot_to_expert_LS)) is None


def test_eplb_waits_until_its_placement_is_there() -> None:
    load = [800.0, 700, 600, 500, 400, 300, 200, 100]
    planner = Eplb().start(None)
    proposal = planner.propose(window(load, [FAST, FAST]))
    assert proposal is not None
    assert planner.propose(window(load, [FAST, FAST])) is None
    assert planner.propose(window(load[::-1], [FAST, FAST], proposal.slot_to_expert_LS)) is not None
