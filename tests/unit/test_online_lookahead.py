"""Learning from live traffic: at bounded cost, back after a switch of domain, and never a change of the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import poise
from poise import LLM, SamplingParams
from poise.engine.lookahead_use import LookaheadUse
from poise.engine.online_lookahead import OnlineLearner, OnlineRule
from poise.errors import UsageError
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Training
from poise.predict.lookahead_quality import recall
from poise.predict.mixed import Mixture
from tests.conftest import MakeCheckpoint, OpenRunner

MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
HIDDEN, EXPERTS = 64, 8
NOTHING_TK = np.zeros((300, 2), dtype=np.int64)


class Clock:
    """Goes on by ``tick_s`` whenever it is looked at."""

    def __init__(self, tick_s: float) -> None:
        self.now_s, self.tick_s = 0.0, tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@pytest.fixture
def lookahead(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> Lookahead:
    model = open_runner(checkpoint("qwen3_moe")).model
    return Lookahead.of_model(model, find_experts(model, "qwen3_moe"), width=64)


class Domain:
    """Traffic whose hidden states at the second MoE layer are a fixed map of those at the first."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._between_HH = torch.randn(HIDDEN, HIDDEN, generator=self._random) / 8

    def serve(self, learner: OnlineLearner) -> None:
        with torch.inference_mode():
            hidden_TH = torch.randn(len(NOTHING_TK), HIDDEN, generator=self._random)
            learner.on_seam(0, hidden_TH, NOTHING_TK)
            learner.on_seam(1, hidden_TH @ self._between_HH, NOTHING_TK)

    def recall(self, lookahead: Lookahead) -> float:
        hidden_TH = torch.randn(2000, HIDDEN, generator=torch.Generator().manual_seed(5))
        true_TK = lookahead.own_choices_TK(1, hidden_TH @ self._between_HH)
        return recall(lookahead.choices_TK(1, hidden_TH).numpy(), true_TK.numpy(), EXPERTS)


def test_a_learner_recovers_after_a_switch_of_domain(lookahead: Lookahead) -> None:
    rule = OnlineRule(
        time_frac=1.0, pass_tokens=256, buffer_bytes=2**21, training=Training(learning_rate=5e-3, warm_up_steps=1)
    )
    learner = OnlineLearner(lookahead, rule)
    code, prose = Domain(1), Domain(2)
    marks = []
    for domain in (code, prose):
        marks.append(domain.recall(lookahead))
        for _ in range(150):
            domain.serve(learner)
            learner.idle()
        marks.append(domain.recall(lookahead))
    new, learnt, switched, recovered = marks
    assert learnt > 0.85 > new + 0.3
    assert switched < 0.6
    assert recovered > 0.85


def test_learning_takes_no_more_than_its_share_of_the_time(lookahead: Lookahead) -> None:
    clock = Clock(0.001)
    learner = OnlineLearner(lookahead, OnlineRule(time_frac=0.05), clock=clock)
    domain = Domain(1)
    for _ in range(10):
        domain.serve(learner)
    asked = 4000
    made = sum(learner.idle() for _ in range(asked))
    assert made == learner.steps
    assert learner.spent_s <= 0.05 * clock.now_s + 0.001
    assert learner.spent_s > 0.04 * clock.now_s, "it could have learnt more"


def test_time_that_was_not_used_is_kept_only_a_little(lookahead: Lookahead) -> None:
    clock = Clock(0.001)
    learner = OnlineLearner(lookahead, OnlineRule(time_frac=0.05, saved_s=0.01), clock=clock)
    domain = Domain(1)
    for _ in range(10):
        domain.serve(learner)
    learner.idle()
    clock.now_s += 3600
    assert sum(learner.idle() for _ in range(100)) <= 0.01 / 0.001 + 0.05 * 100 + 1


def test_an_aborted_pass_leaves_no_tokens(lookahead: Lookahead) -> None:
    learner = OnlineLearner(lookahead, OnlineRule(time_frac=1.0), clock=Clock(1.0))
    with torch.inference_mode():
        for _ in range(50):
            learner.on_seam(0, torch.randn(300, HIDDEN), NOTHING_TK)
    assert not any(learner.idle() for _ in range(5))


def test_a_lookahead_reads_ahead_better_than_the_table_and_changes_no_text() -> None:
    prompts = ["def main():", "The file is", "import os\n", "class Reader:"]
    params = [SamplingParams(max_tokens=80, temperature=0.9, seed=seed, ignore_eos=True) for seed in range(4)]
    texts, shares = [], []
    for use in (
        None,
        LookaheadUse(prefetches=True, mixes=True),
        LookaheadUse(prefetches=True),
        LookaheadUse(width=16, prefetches=True, online=True),
    ):
        with LLM(MODEL, memory="1GiB", expert_slots=64, lookahead=use) as llm:
            texts.append([one.outputs[0].text for one in llm.generate(prompts, params)])
            assert llm.last_progress is not None
            shares.append(llm.last_progress.decode_ahead.used_frac)
            if llm.online is not None:
                assert llm.online.steps > 0
    assert texts[0] == texts[1] == texts[2] == texts[3]
    table, frozen, alone, online = [share for share in shares if share is not None]
    assert frozen > table
    assert alone > table
    assert online > table


def test_routers_of_layers_whose_dense_weights_stream_stay_in_memory() -> None:
    prompt, params = "def main():", SamplingParams(max_tokens=12)
    texts = []
    for use in (None, LookaheadUse(width=4, prefetches=True, online=True)):
        with LLM(MODEL, memory="1GiB", expert_slots=64, dense_layers=0, lookahead=use) as llm:
            assert llm.describe()["dense_layers_streamed"] == 6
            texts.append(llm.generate(prompt, params)[0].outputs[0].text)
            if llm.lookahead is not None:
                assert llm.lookahead.learning_layers == (1, 2, 3, 4, 5)
    assert texts[0] == texts[1]


def test_a_lookahead_that_cannot_learn_does_not_learn_online() -> None:
    with pytest.raises(UsageError, match="nothing that could learn"):
        LookaheadUse(online=True)


def test_mixed_chances_sum_to_the_choices_of_a_token() -> None:
    rng = np.random.default_rng(0)
    table_TE = rng.dirichlet(np.ones(8), size=5).astype(np.float32) * 2
    named_TK = np.array([[0, 3], [1, 2], [7, 6], [5, 4], [0, 8]])
    chances_TE = Mixture(8).chances_TE(named_TK, table_TE)
    assert chances_TE[0, [0, 3]].tolist() == pytest.approx([0.75, 0.75])
    np.testing.assert_allclose(chances_TE[:4].sum(axis=1), 2.0, rtol=1e-5)
    assert (chances_TE[4, 1:] < 0.75).all()


def test_a_mixture_learns_whom_to_trust_and_which_experts_come_more_often_than_named() -> None:
    rng = np.random.default_rng(0)
    mixture = Mixture(8)
    table_TE = np.full((64, 8), 0.25, dtype=np.float32)
    for _ in range(100):
        named_TK = rng.permuted(np.tile(np.arange(1, 8), (64, 1)), axis=1)[:, :2]
        chosen_TK = named_TK.copy()
        chosen_TK[:32, 0] = 0  # never named, and chosen by every second token
        mixture.observe(named_TK, table_TE, chosen_TK)
    assert mixture.hit_frac == pytest.approx(0.75, abs=0.02)
    chances_E = mixture.chances_TE(named_TK, table_TE).sum(axis=0)
    assert chances_E[0] == pytest.approx(32, rel=0.1)
    assert chances_E.sum() == pytest.approx(128, rel=0.1)
