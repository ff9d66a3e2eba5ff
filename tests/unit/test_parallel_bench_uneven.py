"""Placements as uneven as asked for, and what a model's shapes say of its predictors."""

from __future__ import annotations

import numpy as np
import pytest

from poise.bench.parallel.shapes import Shape
from poise.bench.parallel.uneven import uneven

RANKS = 4


def of_ranks(load_LE: np.ndarray, slots_LS: np.ndarray) -> np.ndarray:
    """Tokens over the mean, (L, R)."""
    load_LR = np.take_along_axis(load_LE, slots_LS.astype(int), axis=1).reshape(len(load_LE), RANKS, -1).sum(axis=2)
    over_LR: np.ndarray = load_LR / load_LR.mean(axis=1, keepdims=True)
    return over_LR


@pytest.mark.parametrize("imbalance", [1.1, 1.5, 2.0])
def test_one_rank_of_each_layer_is_as_busy_as_asked_for(imbalance: float) -> None:
    draw = np.random.default_rng(0)
    load_LE = np.stack([draw.permutation(np.arange(1.0, 33.0) ** -0.8) for _ in range(6)])
    placed = uneven(load_LE, ranks=RANKS, imbalance=imbalance)
    over_LR = of_ranks(load_LE, placed.slot_to_expert_LS)
    assert over_LR.max(axis=1) == pytest.approx(imbalance, abs=0.02)
    assert over_LR.argmax(axis=1).tolist() == [0, 1, 2, 3, 0, 1]
    assert np.sort(placed.slot_to_expert_LS, axis=1).tolist() == [list(range(32))] * 6


def test_more_than_the_most_popular_experts_bring_cannot_be() -> None:
    load_LE = np.arange(8.0, 0.0, -1.0)[None]
    placed = uneven(load_LE, ranks=RANKS, imbalance=3.0)
    assert sorted(placed.slot_to_expert_LS[0, :2].tolist()) == [0, 1]


def test_predicting_is_counted_in_flops_of_experts() -> None:
    shape = Shape(layers=6, hidden=192, experts=32, top_k=4, expert_width=1280)
    assert shape.predicting_frac(None) == pytest.approx(5 / 6 * 32 / (3 * 1280 * 4))
    assert shape.predicting_frac(64) == pytest.approx(5 / 6 * (192 * 32 + 192 * 64 + 64 * 32) / (3 * 192 * 1280 * 4))
