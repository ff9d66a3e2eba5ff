"""When ranks get another placement: costs seen in noise, EPLB by the clock, ViBE when it pays."""

from __future__ import annotations

import numpy as np
import pytest

from poise.plan.observed_costs import ObservedCost, fit, rank_costs
from poise.plan.placement import predict_s_LR
from poise.plan.rebalance import Eplb, Vibe, Window

FAST, SLOW = ObservedCost(expert_s=1e-4, token_s=1e-6), ObservedCost(expert_s=2e-4, token_s=2e-6)
CONTIGUOUS = np.tile(np.arange(8), (2, 1))


def window(load_E: list[float], costs: list[ObservedCost | None], current_LS: np.ndarray = CONTIGUOUS) -> Window:
    return Window(load_LE=np.tile(load_E, (2, 1)) * 10.0, steps=10, costs_R=tuple(costs), current_LS=current_LS)


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
    assert found == ObservedCost(expert_s=0.0, token_s=pytest.approx(1e-6))


def test_a_rank_that_was_idle_is_taken_for_an_ordinary_one() -> None:
    costs = rank_costs([FAST, None, SLOW])
    assert costs is not None
    seconds_R = costs.seconds_LR(np.full((1, 3), 500.0), np.full((1, 3), 2.0))[0]
    assert seconds_R.tolist() == pytest.approx([7e-4, 10.5e-4, 14e-4])
    assert rank_costs([None, None]) is None


def test_vibe_takes_load_from_the_slow_rank_and_then_rests() -> None:
    vibe, load = Vibe(), [800.0, 700, 600, 500, 400, 300, 200, 100]
    proposal = vibe.propose(window(load, [SLOW, FAST]))
    assert proposal is not None
    rank_loads = np.array(load)[proposal.slot_to_expert_LS].reshape(2, 2, 4).sum(axis=2)
    assert (rank_loads[:, 0] < rank_loads[:, 1]).all()
    costs = rank_costs([SLOW, FAST])
    assert costs is not None
    before, after = (
        predict_s_LR(np.tile(load, (2, 1)), slots, costs).max() for slots in (CONTIGUOUS, proposal.slot_to_expert_LS)
    )
    assert proposal.gain_frac == pytest.approx(1 - after / before)
    assert vibe.propose(window(load, [SLOW, FAST], proposal.slot_to_expert_LS)) is None, "it moves once"


def test_vibe_does_not_move_for_little_nor_without_knowing_costs() -> None:
    assert Vibe().propose(window([100.0] * 8, [FAST, FAST])) is None
    assert Vibe().propose(window([900.0, 1, 1, 1, 1, 1, 1, 1], [None, None])) is None
    assert Vibe().propose(window([0.0] * 8, [FAST, SLOW])) is None


def test_eplb_balances_tokens_and_does_not_see_speeds() -> None:
    load = [800.0, 700, 600, 500, 400, 300, 200, 100]
    one, other = (Eplb().propose(window(load, costs)) for costs in ([SLOW, FAST], [FAST, SLOW]))
    assert one is not None
    assert other is not None
    assert np.array_equal(one.slot_to_expert_LS, other.slot_to_expert_LS)
    rank_loads = np.array(load)[one.slot_to_expert_LS].reshape(2, 2, 4).sum(axis=2)
    assert (rank_loads == 1800).all()
    assert Eplb().propose(window(load, [SLOW, FAST], one.slot_to_expert_LS)) is None
