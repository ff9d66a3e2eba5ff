"""When a rank learns: in waits that last, between passes as all do, at bounded cost, and never from nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from poise.engine.rank_learning import BETWEEN_FRAC, BETWEEN_PASSES, RANK_RULE, AsideLearning, RankLearning
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.seam import Parked
from tests.conftest import MakeCheckpoint, OpenRunner

HIDDEN, LAYERS = 64, 2
STEP_S = 0.01


class Clock:
    """Goes on where it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def model(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> torch.nn.Module:
    whole: torch.nn.Module = open_runner(checkpoint("qwen3_moe")).model
    return whole


class Rank:
    """A rank that computes passes of ``PASS_S``, and then waits for others at each layer."""

    PASS_S = 1.0

    def __init__(self, model: torch.nn.Module, *, time_frac: float = 0.05) -> None:
        modules = find_experts(model, "qwen3_moe")
        self.clock = Clock()
        self.lookahead = Lookahead.of_model(model, modules, width=8)
        self._expert_modules = [model.get_submodule(module.name) for module in modules]
        rule = replace(RANK_RULE, time_frac=time_frac, saved_s=1.0)
        self.learning: RankLearning | AsideLearning = RankLearning(self.lookahead, rule=rule, clock=self.clock)
        self._train = self.learning._learner._trainer.learn
        self.learning._learner._trainer.learn = self._slowly  # type: ignore[method-assign]
        self._random = torch.Generator().manual_seed(0)
        self._passes = 0

    def _slowly(self, *arguments: torch.Tensor, **more: float) -> float:
        self.clock.now_s += STEP_S
        return self._train(*arguments, **more)  # type: ignore[arg-type]

    def run(self, *, waits_s: float, tokens: int = 300) -> int:
        """A pass; how many steps were made while waiting."""
        steps = self.learning._learner.steps
        for layer, module in enumerate(self._expert_modules):
            with torch.inference_mode():
                hidden_TH = torch.randn(tokens, HIDDEN, generator=self._random)
            index_TK = torch.zeros(tokens, 2, dtype=torch.int64)
            parked = Parked(
                module=module, hidden_TH=hidden_TH, top_k_index_TK=index_TK, top_k_weights_TK=index_TK.float()
            )
            self.learning.on_layer(layer, [parked] if tokens else [], [None] if tokens else [])
            self.clock.now_s += self.PASS_S / LAYERS
            began_s = self.clock.now_s
            self.learning.wait(layer, lambda ends_s=began_s + waits_s: self.clock.now_s >= ends_s)  # type: ignore[misc]
            self.clock.now_s = max(self.clock.now_s, began_s + waits_s)
            self.learning.waited(layer, self.clock.now_s - began_s)
        made = self.learning._learner.steps - steps
        self._passes += 1
        self.learning.between_passes(self._passes)
        return made


def test_a_rank_that_waits_learns_and_one_that_others_wait_for_only_when_all_do(model: torch.nn.Module) -> None:
    early, slowest = Rank(model), Rank(model)
    made = [(early.run(waits_s=0.2), slowest.run(waits_s=0.0)) for _ in range(8 * BETWEEN_PASSES)]
    assert sum(of_early for of_early, _ in made) > 100
    assert sum(of_slowest for _, of_slowest in made) == 0
    between = slowest.learning.taken()
    assert between.steps > 0
    assert between.seconds <= BETWEEN_FRAC * slowest.clock.now_s + STEP_S
    assert between.late == 0


def test_all_steps_together_keep_to_their_share_of_the_time(model: torch.nn.Module) -> None:
    rank = Rank(model)
    for _ in range(60):
        rank.run(waits_s=0.5)
    learnt = rank.learning.taken()
    assert learnt.seconds == pytest.approx(0.05 * rank.clock.now_s, rel=0.15)
    assert learnt.seconds <= 0.05 * rank.clock.now_s + STEP_S
    assert rank.learning.taken().steps == 0, "it was told"


def test_waits_shorter_than_a_step_are_not_used_and_do_not_grow_by_it(model: torch.nn.Module) -> None:
    rank = Rank(model, time_frac=1.0)
    for _ in range(BETWEEN_PASSES):
        rank.run(waits_s=0.5)
    assert rank.learning.taken().steps > 0
    made = [rank.run(waits_s=0.6 * STEP_S) for _ in range(10)]
    late = rank.learning.taken().late
    assert sum(made) == late <= LAYERS, "only by what it knew of waits before"
    assert made[-5:] == [0] * 5


def test_a_rank_without_tokens_waits_and_keeps_nothing(model: torch.nn.Module) -> None:
    rank = Rank(model)
    for _ in range(2 * BETWEEN_PASSES):
        rank.run(waits_s=0.5, tokens=0)
    assert rank.learning.taken().steps == 0
    for _ in range(2 * BETWEEN_PASSES):
        rank.run(waits_s=0.5)
        rank.run(waits_s=0.5, tokens=0)
    assert rank.learning.taken().steps > 0


def test_beside_the_computing_thread_a_pass_is_handed_over_and_learnt_from_where_the_other_thread_likes(
    model: torch.nn.Module,
) -> None:
    rank = Rank(model, time_frac=1.0)
    learner, handed = rank.learning._learner, list[tuple[Callable[[], None], Future[None]]]()

    def submit(work: Callable[[], None]) -> Future[None]:
        handed.append((work, Future()))
        return handed[-1][1]

    rank.learning = AsideLearning(learner, submit, num_layers=LAYERS)
    for _ in range(2 * BETWEEN_PASSES):
        assert rank.run(waits_s=0.5) == 0, "nothing is learnt in waits"
    assert learner.steps == 0, "or between passes"
    assert len(handed) == 1, "the passes behind it are not kept while it waits to be taken"
    work, future = handed[0]
    assert not learner.idle(), "it knows of no pass yet"
    work()
    future.set_result(None)
    rank.run(waits_s=0.5, tokens=0)
    assert len(handed) == 1, "there was nothing to hand over"
    assert learner.idle()
    learnt = rank.learning.taken()
    assert (learnt.steps, learnt.late) == (1, 0)
    assert learnt.seconds == pytest.approx(STEP_S)
    assert rank.learning.taken().steps == 0, "it was told"
    rank.run(waits_s=0.5)
    assert len(handed) == 2
