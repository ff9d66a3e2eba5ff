"""Time of one layer outside its experts and its gate, against tokens and the length of the context.

Measured at a few context lengths; between them, and behind the longest, time is linear in the context, as the work of
attention is. Below the shortest it is that of the shortest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from poise.cost.curves import Floats, TokenCurve


class AttentionCurve:
    """T(tokens, context) for sequences that bring ``row_tokens`` each (1 in decode, a chunk in prefill)."""

    def __init__(self, row_tokens: int, by_context: Mapping[int, TokenCurve]) -> None:
        assert by_context, "attention needs a curve"
        self.row_tokens = row_tokens
        self.contexts_C = tuple(sorted(by_context))
        self._curves_C = tuple(by_context[context] for context in self.contexts_C)

    def seconds(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Floats:
        """Time of all tokens of a pass, ``context_tokens`` being a sequence's length behind it; the two are broadcast."""
        context = np.maximum(np.asarray(context_tokens, dtype=float), self.contexts_C[0])
        first = self._curves_C[0].seconds(tokens)
        total = np.broadcast_to(first, np.broadcast_shapes(first.shape, context.shape))
        below = first
        for index in range(1, len(self.contexts_C)):
            begin, end = self.contexts_C[index - 1 : index + 1]
            above = np.maximum(self._curves_C[index].seconds(tokens), below)
            share = (context - begin) / (end - begin)
            is_last = index == len(self.contexts_C) - 1
            total = total + (above - below) * np.clip(share, 0.0, None if is_last else 1.0)
            below = above
        return np.asarray(total)
