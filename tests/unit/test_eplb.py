"""The token balancer does what the published one does."""

from __future__ import annotations

import numpy as np
import pytest

from poise.plan.eplb import balance_tokens, pack_evenly, replicate
from poise.plan.expert_loads import rank_loads

EXAMPLE_LE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=float,
)
"""Of the README of github.com/deepseek-ai/EPLB."""


def test_the_published_example() -> None:
    placed_LS = balance_tokens(EXAMPLE_LE, num_slots=16, num_ranks=8, num_nodes=2, num_groups=4)
    assert placed_LS.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_nodes_that_do_not_divide_groups_are_ignored() -> None:
    flat_LS = balance_tokens(EXAMPLE_LE, num_slots=16, num_ranks=8)
    assert (balance_tokens(EXAMPLE_LE, num_slots=16, num_ranks=8, num_nodes=2, num_groups=3) == flat_LS).all()


def test_lognormal_loads_come_out_as_balanced_as_published_figures_say() -> None:
    load_LE = np.random.default_rng(0).lognormal(0.0, 1.0, (58, 256))
    tokens_LR, _ = rank_loads(load_LE, balance_tokens(load_LE, num_slots=256, num_ranks=8), 8)
    assert (tokens_LR.max(axis=1) / tokens_LR.mean(axis=1)).mean() == pytest.approx(1.0025, abs=0.001)


def test_packs_hold_equally_many() -> None:
    pack_XN, place_XN = pack_evenly(np.array([[9.0, 1, 1, 1, 1, 1]]), 2)
    assert pack_XN.tolist() == [[0, 1, 1, 1, 0, 0]]
    assert place_XN.tolist() == [[0, 0, 1, 2, 1, 2]]


def test_the_heaviest_copy_is_split() -> None:
    item_XP, copies_XN = replicate(np.array([[10.0, 4.0, 1.0]]), 6)
    assert item_XP.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert copies_XN.tolist() == [[3, 2, 1]]
