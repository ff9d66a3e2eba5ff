"""Whether a placement is worth it: a real gain is seen as one, noise is not; judged on steps that the plan has not seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from poise.cost.curves import ClosedFormCurve
from poise.cost.experts import ExpertCurve
from poise.plan.advice import LEAST_NOISE_FRAC, PlacementAdvice, advise, contiguous_LS
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import RankCosts

LAYERS, EXPERTS, RANKS = 3, 16, 4
LINEAR = ExpertCurve({1: ClosedFormCurve(0.0, 1e-6, 1.0)})


def costs(speed_R: tuple[float, ...] = (1.0,) * RANKS) -> RankCosts:
    return RankCosts.of_curves([LINEAR] * RANKS, speed_R)


def request(load_NLE: npt.NDArray[np.int64], current_LS: npt.NDArray[np.int64] | None = None) -> PlacementRequest:
    load_LE = load_NLE.sum(axis=0).astype(float)
    return PlacementRequest(load_LE=load_LE, num_ranks=RANKS, slots_per_rank=EXPERTS // RANKS, current_LS=current_LS)


def advice(load_NLE: npt.NDArray[np.int64], ranks: RankCosts, current: bool = False) -> PlacementAdvice:
    asked = request(load_NLE)
    if current:
        asked = request(load_NLE, advise(load_NLE, asked, ranks, expert_bytes=1).plan.slot_to_expert_LS)
    return advise(load_NLE, asked, ranks, expert_bytes=1)


def steps(seed: int, mean_LE: npt.NDArray[np.float64], count: int = 40) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(mean_LE, (count, *mean_LE.shape))


SKEWED_LE = np.tile(400.0 * 0.7 ** np.arange(EXPERTS), (LAYERS, 1))
"""Contiguous placement puts the four hottest experts on rank 0: 304 of 400 tokens, against a mean of a quarter."""


def test_a_skew_that_lasts_is_worth_a_placement() -> None:
    found = advice(steps(0, SKEWED_LE), costs())
    assert found.is_worth_it
    assert found.now_s > found.planned_s >= found.bound_s > 0
    assert found.gain_frac == pytest.approx(1 - found.planned_s / found.now_s, abs=0.02)
    assert len(found.held_out_gains) == 8


def test_a_plan_on_top_of_itself_is_to_be_left() -> None:
    found = advice(steps(0, SKEWED_LE), costs(), current=True)
    assert not found.is_worth_it
    assert abs(found.gain_frac) <= found.noise_frac


def test_noise_alone_is_to_be_left() -> None:
    """Equal experts, few steps of few tokens: by its own loads the plan is far better, on unseen ones it is not.

    A 95 % interval is wrong upwards in one case of forty.
    """
    taken_in = 0
    for seed in range(40):
        found = advice(steps(seed, np.full((LAYERS, EXPERTS), 1.0), count=8), costs())
        assert 1 - found.planned_s / found.now_s > 0.05, "the plan fits its own noise"
        taken_in += found.is_worth_it
    assert taken_in <= 3


def test_one_step_is_judged_by_the_floor_alone() -> None:
    found = advice(steps(0, SKEWED_LE, count=1), costs())
    assert (found.held_out_gains, found.noise_frac) == ((), LEAST_NOISE_FRAC)
    assert found.gain_frac == 1 - found.planned_s / found.now_s


def test_a_slow_rank_is_seen_where_tokens_are_balanced() -> None:
    found = advice(steps(0, SKEWED_LE), costs((1.0, 1.0, 1.0, 0.5)))
    assert found.planned_s < found.token_balanced_s


def test_no_load_is_no_gain() -> None:
    found = advice(np.zeros((4, LAYERS, EXPERTS), dtype=np.int64), costs())
    assert (found.now_s, found.gain_frac, found.is_worth_it) == (0.0, 0.0, False)


def test_engines_start_with_the_contiguous_map() -> None:
    asked = PlacementRequest(load_LE=np.ones((2, 4)), num_ranks=2, slots_per_rank=3)
    assert contiguous_LS(asked).tolist() == [[0, 1, 2, 3, 0, 1]] * 2
