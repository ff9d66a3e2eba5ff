"""Cutting text, what a teacher learns from a pass, how predictions are marked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from poise.engine.distillation import LEAST_TOKENS, Teacher, cut
from poise.engine.lookahead_exam import _balanced
from poise.errors import UsageError
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Training, router_loss
from poise.predict.lookahead_quality import misplaced_frac, recall
from tests.conftest import MakeCheckpoint, OpenRunner


def test_documents_are_on_one_side_and_no_token_is_lost_but_short_ends() -> None:
    documents = [[number] * length for number, length in enumerate([600, 2000, 260, 1500, 7, 900])]
    windows = cut(documents, window_tokens=256)
    learnt, held_out = ({one[0] for one in side} for side in (windows.learnt, windows.held_out))
    assert not learnt & held_out
    assert learnt | held_out == {0, 1, 2, 3, 5}
    kept = sum(map(len, windows.learnt)) + sum(map(len, windows.held_out))
    assert kept == 5260 - 4  # of 260 tokens, 4 are too short an end
    assert cut(documents, window_tokens=256) == windows
    one = cut([list(range(9000))])
    assert min(map(len, (one.learnt, one.held_out))) >= 1
    assert not set(one.learnt) & set(one.held_out)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UsageError, match=f"has {LEAST_TOKENS - 1} tokens"):
        cut([[1] * (LEAST_TOKENS - 1)])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "other"])
def test_no_loss_is_lower_than_the_true_routers_own(scores: str) -> None:
    generator = torch.Generator().manual_seed(0)
    true_TE = torch.randn(64, 8, generator=generator)
    own = router_loss(true_TE, true_TE, scores)
    for size in (0.01, 0.3):
        other_TE = true_TE + size * torch.randn(true_TE.shape, generator=generator)
        assert router_loss(other_TE, true_TE, scores) > own


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_a_teacher_brings_a_predictor_near_a_router_that_sees_a_function_of_the_same(
    architecture: str, checkpoint: MakeCheckpoint, open_runner: OpenRunner
) -> None:
    """What comes between the layers is made a fixed map here, so that all of it can be learnt."""
    model = open_runner(checkpoint(architecture)).model
    lookahead = Lookahead.of_model(model, find_experts(model, architecture), width=64)
    teacher = Teacher(lookahead, Training(), total_tokens=60_000)
    generator = torch.Generator().manual_seed(0)
    between_HH = torch.randn(64, 64, generator=generator) / 8
    nothing_TK = np.zeros((1000, 2), dtype=np.int64)
    for _ in range(60):
        with torch.inference_mode():
            hidden_TH = torch.randn(1000, 64, generator=generator)
            teacher.on_seam(0, hidden_TH, nothing_TK)
            teacher.on_seam(1, hidden_TH @ between_HH, nothing_TK)
    hidden_TH = torch.randn(1000, 64, generator=generator)
    true_TK = lookahead.own_choices_TK(1, hidden_TH @ between_HH).numpy()
    frozen = recall(lookahead.own_choices_TK(1, hidden_TH).numpy(), true_TK, 8)
    assert recall(lookahead.choices_TK(1, hidden_TH).numpy(), true_TK, 8) > 0.9 > frozen + 0.3
    assert teacher.tokens == 60_000


def test_marks_of_known_predictions() -> None:
    true_TK = np.array([[0, 1], [2, 3], [4, 5]])
    assert recall(true_TK[:, ::-1], true_TK, 6) == 1.0
    assert recall(np.array([[0, 2], [2, 3], [0, 1]]), true_TK, 6) == 0.5
    assert recall(np.array([[0, 1], [0, 1], [0, 1]]), true_TK, 4) == 0.5  # the last token's choices are masked
    assert misplaced_frac(np.array([2, 0, 2]), np.array([1, 1, 2])) == 0.25


def test_nothing_is_left_when_counts_are_predicted_right_and_something_when_not() -> None:
    rng = np.random.default_rng(0)
    share_E = rng.permutation(1.0 / np.arange(1, 17))
    true_NRE = rng.multinomial(400, share_E / share_E.sum(), size=(6, 4)).astype(float)
    wrong_NRE = true_NRE[:, :, rng.permutation(16)]
    home, balanced, left = _balanced(true_NRE, {"right": true_NRE, "wrong": wrong_NRE}, 16, 2)
    assert home > 1.5 > 1.1 > balanced >= 1.0
    assert left["right"] == 1.0
    assert left["wrong"] > 1.1
