"""Keeps a lookahead learning from live traffic: a few tokens of every pass, in times when nothing else is to do.

Whoever has nothing to do calls ``idle``: the compute thread while it waits for an expert to be read, and the engine between
passes. Each call makes at most one step of one layer, and none beyond ``time_frac`` of the time since traffic began, so that
the cost is bounded whatever a step takes. Steps draw from the newest tokens, of which a fixed number of bytes is kept.
The bound is on time, not on when: unused time is kept for later, but only a little of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from poise.engine.routing import Ints
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Trainer, Training, own_copy
from poise.units import MIB

BUFFER_BYTES = 64 * MIB
"""Of hidden states that are kept to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRule:
    """``time_frac``: most of the time that learning may take; ``saved_s``: most of it that is kept for later.

    ``pass_tokens``: of a pass with more, an even sample is kept. ``training``: a rate that does not fall. Decision 043.
    """

    time_frac: float = 0.05
    saved_s: float = 0.25
    pass_tokens: int = 64
    buffer_bytes: int = BUFFER_BYTES
    training: Training = Training(learning_rate=1e-3)  # noqa: RUF009  # frozen

    def capacity(self, row_bytes: int) -> int:
        """Tokens that are kept, of so many bytes at all layers: at least those of a step, and of a pass."""
        return max(self.training.batch_tokens, self.pass_tokens, self.buffer_bytes // row_bytes)

    def sample_TH(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """What is kept of a pass's tokens at one layer: an ordinary copy."""
        return own_copy(hidden_TH[:: -(-len(hidden_TH) // self.pass_tokens)])

    def most_bytes(self, row_bytes: int) -> int:
        """Of the tokens that are kept, those of the pass at hand, and those of one that is handed over."""
        return (self.capacity(row_bytes) + 2 * self.pass_tokens) * row_bytes

    def __post_init__(self) -> None:
        assert 0 < self.time_frac <= 1, "a share of the time"
        assert self.pass_tokens >= 1, "a token of each pass"


RANK_RULE = OnlineRule(
    pass_tokens=256,
    buffer_bytes=16 * MIB,
    training=Training(learning_rate=3e-3, batch_tokens=128, warm_up_steps=10),
)
"""Of ranks: small steps and a high rate, as there is little time, and many tokens of a pass, as a rank sees few."""


class OnlineLearner:
    """A seam listener that collects, and learns in ``idle``. ``steps`` and ``spent_s``: what was done and took.

    ``clock``: seconds that never go back.
    """

    def __init__(
        self,
        lookahead: Lookahead,
        rule: OnlineRule | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        seed: int = 0,
    ) -> None:
        self._rule = rule or OnlineRule()
        self._lookahead = lookahead
        self._trainer = Trainer(lookahead, self._rule.training, seed=seed)
        self._random = torch.Generator().manual_seed(seed)
        self._clock = clock
        self._layers = lookahead.learning_layers
        self._turn = 0
        self._pass: list[torch.Tensor] = []
        self._kept_L: list[torch.Tensor] = []
        self._write = self._filled = 0
        self._last_s: float | None = None
        self._allowed_s = 0.0
        self.steps = 0
        self.spent_s = 0.0

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``."""
        self.saw(layer, hidden_TH)

    def saw(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """A pass's tokens are kept once it has reached its last layer. They are as many at all of its layers, or none."""
        if layer == 0:
            self._pass.clear()
        if not len(hidden_TH):
            return
        self._pass.append(self._rule.sample_TH(hidden_TH))
        if layer + 1 == len(self._lookahead.experts_L):
            self.keep(self._pass)
            self._pass.clear()

    def keep(self, pass_LTH: Sequence[torch.Tensor]) -> None:
        """Puts samples of a pass at each of its layers where the oldest were; a token has the same place at every layer."""
        if self._last_s is None:
            self._last_s = self._clock()
        if not self._kept_L:
            row_bytes = sum(states_TH[0].nbytes for states_TH in pass_LTH)
            capacity = self._rule.capacity(row_bytes)
            with torch.inference_mode(False):
                self._kept_L = [states_TH.new_empty(capacity, states_TH.shape[1]) for states_TH in pass_LTH]
        capacity, count = len(self._kept_L[0]), len(pass_LTH[0])
        places_T = (self._write + torch.arange(count)) % capacity
        with torch.inference_mode(False):
            for kept_TH, states_TH in zip(self._kept_L, pass_LTH, strict=True):
                kept_TH[places_T] = states_TH
        self._write = (self._write + count) % capacity
        self._filled = min(capacity, self._filled + count)

    def idle(self) -> bool:
        """Makes a step if it may; whether it did. Takes milliseconds."""
        now_s = self._clock()
        if self._last_s is None:
            return False
        self._allowed_s += self._rule.time_frac * (now_s - self._last_s)
        self._last_s = now_s
        self._allowed_s = min(self._allowed_s, self._rule.saved_s)
        if self._allowed_s <= 0 or not self._layers or self._filled < self._rule.training.batch_tokens:
            return False
        layer = self._layers[self._turn % len(self._layers)]
        self._turn += 1
        with torch.inference_mode(False):
            drawn_T = torch.randint(self._filled, (self._rule.training.batch_tokens,), generator=self._random)
            before_TH, own_TH = self._kept_L[layer - 1][drawn_T], self._kept_L[layer][drawn_T]
        self._trainer.learn(layer, before_TH, own_TH)
        took_s = self._clock() - now_s
        self._allowed_s -= took_s
        self.spent_s += took_s
        self.steps += 1
        return True
