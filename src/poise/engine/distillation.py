"""Teaches lookahead predictors from a stream of text that runs through the engine, experts streamed as they are.

Documents are cut into windows, some kept for the examination (``engine.lookahead_exam``); the others run once or a few times,
and each MoE layer's predictor learns from a pass while the pass is at that layer: nothing of it is kept longer. The rate falls
linearly to nothing over the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from poise.engine.lookahead_use import KEPT_TOKENS
from poise.engine.routing import Ints
from poise.errors import UsageError
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Trainer, Training, own_copy
from poise.predict.correlation import CorrelationTable

WINDOW_TOKENS = 256
SHORTEST_WINDOW = 8
"""What is left of a document is a window of its own from so many tokens on."""
HELD_OUT_FRAC = 0.1
LEAST_TOKENS = 4096
"""With less text than this neither training nor its figures mean anything."""
MOST_HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Token ids: to learn from, in random order, and of other documents, to be examined on."""

    learnt: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def cut(documents: Sequence[Sequence[int]], *, window_tokens: int = WINDOW_TOKENS, seed: int = 0) -> Windows:
    """Windows of at most ``window_tokens``. A document is on one side as a whole, unless there is only one.

    Raises UsageError for too little text.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    per_document = [
        [tuple(ids[at : at + window_tokens]) for at in range(0, len(ids), window_tokens)]
        for ids in (documents[place] for place in order)
    ]
    per_document = [[one for one in windows if len(one) >= SHORTEST_WINDOW] for windows in per_document]
    if len(per_document) == 1:
        per_document = [[one] for one in reversed(per_document[0])]
    total = sum(len(one) for windows in per_document for one in windows)
    if total < LEAST_TOKENS:
        raise UsageError(
            f"the text has {total} tokens in pieces of {SHORTEST_WINDOW} or more; a predictor needs {LEAST_TOKENS}: give more"
        )
    held_out: list[tuple[int, ...]] = []
    learnt: list[tuple[int, ...]] = []
    wanted = min(MOST_HELD_OUT_TOKENS, HELD_OUT_FRAC * total)
    for windows in per_document:
        (held_out if sum(map(len, held_out)) < wanted else learnt).extend(windows)
    if not learnt:
        raise UsageError("all of the text is one short document and a long one; give more documents")
    np.random.default_rng(seed).shuffle(learnt)
    return Windows(learnt=tuple(learnt), held_out=tuple(held_out))


class Teacher:
    """A seam listener that has every predictor learn from the passes, and a correlation table beside it, if there is one.

    ``total_tokens``: of all passes, for the rate's schedule. ``tokens``: real tokens so far, of which an even sample of
    ``KEPT_TOKENS`` a pass is learnt from. ``loss``: the mean of the last pass's layers, in nats.
    """

    def __init__(
        self,
        lookahead: Lookahead,
        training: Training,
        *,
        total_tokens: int,
        table: CorrelationTable | None = None,
        seed: int = 0,
    ) -> None:
        self._lookahead = lookahead
        self._trainer = Trainer(lookahead, training, seed=seed)
        self._table = table
        self._total_tokens = total_tokens
        self._before_TH: torch.Tensor | None = None
        self._previous_TK: Ints | None = None
        self._losses: list[float] = []
        self.tokens = 0
        self.loss: float | None = None

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``."""
        own_TH = own_copy(hidden_TH[:: -(-len(hidden_TH) // KEPT_TOKENS)])
        if self._table is not None:
            self._table.observe(layer, chosen_TK, self._previous_TK if layer else None)
            self._previous_TK = chosen_TK
        if layer == 0:
            self._losses.clear()
        elif layer in self._lookahead.learning_layers and self._before_TH is not None:
            rate_frac = max(0.0, 1.0 - self.tokens / self._total_tokens)
            self._losses.append(self._trainer.learn(layer, self._before_TH, own_TH, rate_frac=rate_frac))
        self._before_TH = own_TH
        if layer + 1 == len(self._lookahead.experts_L):
            self.tokens += len(chosen_TK)
            self.loss = float(np.mean(self._losses)) if self._losses else None
            self._before_TH = None
