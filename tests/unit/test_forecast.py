"""What ranks expect of their tokens in the next layer, by each of the strategies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from poise.engine.runner import Runner
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.parallel.forecast import Ahead, LastPass, Replayed
from tests.conftest import MakeCheckpoint, OpenRunner

LAYERS, EXPERTS, HIDDEN = 2, 8, 64
NOBODY_T = torch.empty(0, dtype=torch.bool)
NOTHING_TH = torch.empty(0, HIDDEN)


@pytest.fixture
def lookahead(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> Lookahead:
    """Frozen routers of a model of two layers of eight experts, two of which a token chooses."""
    runner: Runner = open_runner(checkpoint("qwen3_moe"))
    return Lookahead.of_model(runner.model, find_experts(runner.model, "qwen3_moe"))


def counts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, EXPERTS)


def test_the_next_pass_is_as_the_last_one_layer_by_layer() -> None:
    forecast = LastPass(LAYERS, EXPERTS)
    np.testing.assert_array_equal(forecast.counts_E(1, NOTHING_TH, NOBODY_T), 0, "nothing is known at first")
    for number in range(2):
        forecast.saw(0, counts(number))
        forecast.saw(1, counts(10 + number))
    for layer, expected in enumerate((counts(1), counts(11))):
        expected_E = forecast.counts_E(layer, NOTHING_TH, NOBODY_T)
        np.testing.assert_array_equal(expected_E, expected)
        expected_E += 1
        np.testing.assert_array_equal(forecast.counts_E(layer, NOTHING_TH, NOBODY_T), expected, "not its own array")


def test_what_was_kept_is_told_for_the_layer_that_follows() -> None:
    kept_PLE = np.arange(3 * LAYERS * EXPERTS).reshape(3, LAYERS, EXPERTS)
    forecast = Replayed(kept_PLE)
    told = []
    for _ in range(3):
        for layer in range(LAYERS):
            forecast.saw(layer, counts(layer))
            told.append(forecast.counts_E((layer + 1) % LAYERS, NOTHING_TH, NOBODY_T))
    np.testing.assert_array_equal(told[:-1], kept_PLE.reshape(-1, EXPERTS)[1:])
    np.testing.assert_array_equal(told[-1], 0, "behind the last pass nothing is known")


def test_a_layer_ahead_is_what_its_router_says_of_the_tokens_that_are_real(lookahead: Lookahead) -> None:
    forecast = Ahead(lookahead, LAYERS, EXPERTS)
    hidden_TH = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(0))
    real_T = torch.arange(30) % 3 > 0
    counted_E = forecast.counts_E(1, hidden_TH, real_T)
    assert counted_E.sum() == 2 * 20
    chosen_TK = lookahead.choices_TK(1, hidden_TH)[real_T]
    np.testing.assert_array_equal(counted_E, np.bincount(chosen_TK.flatten(), minlength=EXPERTS))
    assert forecast.counts_E(1, hidden_TH, torch.ones(30, dtype=torch.bool)).sum() == 2 * 30


def test_no_tokens_choose_nothing(lookahead: Lookahead) -> None:
    """Neither a rank without a batch nor one whose rows are padding."""
    forecast = Ahead(lookahead, LAYERS, EXPERTS)
    forecast.saw(1, counts(0))
    np.testing.assert_array_equal(forecast.counts_E(1, NOTHING_TH, NOBODY_T), np.zeros(EXPERTS))
    padding_TH = torch.randn(3, HIDDEN)
    np.testing.assert_array_equal(forecast.counts_E(1, padding_TH, torch.zeros(3, dtype=torch.bool)), np.zeros(EXPERTS))


def test_the_first_layer_which_nobody_predicts_is_as_in_the_pass_before(lookahead: Lookahead) -> None:
    forecast = Ahead(lookahead, LAYERS, EXPERTS)
    hidden_TH, real_T = torch.randn(5, HIDDEN), torch.ones(5, dtype=torch.bool)
    np.testing.assert_array_equal(forecast.counts_E(0, hidden_TH, real_T), 0)
    forecast.saw(0, counts(3))
    forecast.saw(1, counts(4))
    np.testing.assert_array_equal(forecast.counts_E(0, hidden_TH, real_T), counts(3))
    np.testing.assert_array_equal(forecast.counts_E(0, NOTHING_TH, NOBODY_T), counts(3))
    assert "1 of 2 layers" in forecast.name


def test_routers_that_cannot_be_asked_leave_the_pass_before() -> None:
    forecast = Ahead(Lookahead([None, None], [EXPERTS] * LAYERS, None), LAYERS, EXPERTS)
    forecast.saw(1, counts(5))
    np.testing.assert_array_equal(
        forecast.counts_E(1, torch.randn(5, HIDDEN), torch.ones(5, dtype=torch.bool)), counts(5)
    )
    assert forecast.name == LastPass(LAYERS, EXPERTS).name
