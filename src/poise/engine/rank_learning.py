"""When a rank's lookahead learns from live traffic: on the thread that predicts, where there is one, else in waits and between.

Each rank predicts the counts of its own tokens, and ranks tell each other counts; so each has a predictor of its own, which
learns from its own tokens, and nothing is agreed or sent. A thread that predicts beside the computing one learns while no look
is on hand. Without one a step is made while outputs are on their way, where that wait has lately been longer than a step; ranks
that are even, and the slowest, have no such waits. So that they learn too, all ranks make steps between passes, all behind the
same ones and for ``BETWEEN_FRAC`` of the time, which costs the group once. All steps of a rank together keep to
``OnlineRule.time_frac``. Where balancing rests nobody learns. Decision 059.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from time import perf_counter

import torch

from poise.engine.online_lookahead import RANK_RULE, OnlineLearner, OnlineRule
from poise.engine.routing import hidden_TH
from poise.model.lookahead import Lookahead
from poise.model.seam import Parked
from poise.parallel.learning import Learnt

BETWEEN_FRAC = 0.02
"""Of the time, for steps that nobody's wait hides."""
BETWEEN_PASSES = 8
"""They are made behind each so many passes."""
MOST_PASS_S = 2.0
"""Longer between two passes that are balanced is a rest, or time in which nobody asked for anything, and is not made up for."""
MARGIN = 2.0
"""A wait is worth a step of which it lasts so many times as long."""
WAITS = 4
"""The shortest of so many is what is known of a wait."""
KEEP = 0.9
"""Of what a step is known to take, when another one has been made."""


class RankLearning:
    """``parallel.learning.Learning`` by an ``OnlineLearner``. ``clock``: seconds that never go back."""

    def __init__(
        self, lookahead: Lookahead, *, rule: OnlineRule = RANK_RULE, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._learner = OnlineLearner(lookahead, rule, clock=clock)
        self._rule, self._clock = rule, clock
        self._waits_L = [deque([0.0], maxlen=WAITS) for _ in lookahead.experts_L]
        """The last ones at each layer."""
        self._step_s: float | None = None
        self._is_late = False
        self._late = 0
        self._between_s, self._seen_s = 0.0, clock()
        self._told = Learnt()

    def on_layer(self, layer: int, parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> None:
        if parked:
            self._learner.saw(layer, hidden_TH(parked, real))

    def wait(self, layer: int, is_over: Callable[[], bool]) -> None:
        """As long as a step is expected to end before the wait does: by the shortest of the last ones at that layer."""
        self._is_late = False
        ends_s = self._clock() + min(self._waits_L[layer])
        while self._step_s is not None and self._clock() + MARGIN * self._step_s < ends_s and not is_over():
            if not self._step():
                return
            self._is_late = is_over()
        self._late += self._is_late

    def waited(self, layer: int, seconds: float) -> None:
        """Of a wait that ended within a step only its begin is known; else steps would make the waits that they need."""
        if self._is_late and self._step_s is not None:
            seconds = max(0.0, seconds - self._step_s)
        self._is_late = False
        self._waits_L[layer].append(seconds)

    def between_passes(self, passes: int) -> None:
        now_s = self._clock()
        since_s = min(now_s - self._seen_s, MOST_PASS_S)
        self._between_s = min(self._between_s + BETWEEN_FRAC * since_s, self._rule.saved_s)
        self._seen_s = now_s
        if passes % BETWEEN_PASSES:
            return
        while self._between_s > 0:
            spent_s = self._learner.spent_s
            if not self._step():
                return
            self._between_s -= self._learner.spent_s - spent_s

    def taken(self) -> Learnt:
        now = Learnt(steps=self._learner.steps, seconds=self._learner.spent_s, late=self._late)
        before, self._told = self._told, now
        return Learnt(steps=now.steps - before.steps, seconds=now.seconds - before.seconds, late=now.late - before.late)

    def _step(self) -> bool:
        spent_s = self._learner.spent_s
        if not self._learner.idle():
            return False
        took_s = self._learner.spent_s - spent_s
        self._step_s = took_s if self._step_s is None else KEEP * self._step_s + (1.0 - KEEP) * took_s
        return True


class AsideLearning:
    """``parallel.learning.Learning`` by a learner that makes its steps on another thread, where alone it is touched.

    ``submit``: has that thread do something behind what it was given before.
    """

    def __init__(
        self,
        learner: OnlineLearner,
        submit: Callable[[Callable[[], None]], Future[None]],
        *,
        num_layers: int,
        rule: OnlineRule = RANK_RULE,
    ) -> None:
        self._learner, self._submit, self._num_layers, self._rule = learner, submit, num_layers, rule
        self._pass: list[torch.Tensor] = []
        self._handed: Future[None] | None = None
        self._told = Learnt()

    def on_layer(self, layer: int, parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> None:
        """A pass's tokens are handed over as a whole, unless those of an earlier one wait to be taken."""
        if layer == 0:
            self._pass = []
        if parked:
            states_TH = hidden_TH(parked, real)
            self._pass += [self._rule.sample_TH(states_TH)] if len(states_TH) else []
        if len(self._pass) == self._num_layers and (self._handed is None or self._handed.done()):
            self._handed = self._submit(partial(self._learner.keep, self._pass))

    def wait(self, layer: int, is_over: Callable[[], bool]) -> None:
        """Waits are left alone."""

    def waited(self, layer: int, seconds: float) -> None:
        """As they are."""

    def between_passes(self, passes: int) -> None:
        """Nothing is left to do then."""

    def taken(self) -> Learnt:
        before, self._told = self._told, Learnt(steps=self._learner.steps, seconds=self._learner.spent_s)
        return Learnt(steps=self._told.steps - before.steps, seconds=self._told.seconds - before.seconds)
