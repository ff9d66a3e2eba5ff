"""Tells the store what the next layer will need by a lookahead predictor, mixed with the correlation table.

The table goes on learning as it does alone (``engine.prefetcher``), and stands in for layers that no router can be asked
about, the first of the next pass among them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from poise.engine.prefetcher import MAX_LEARNT
from poise.engine.routing import Ints
from poise.model.lookahead import Lookahead
from poise.plan.outlook import Foreseen
from poise.predict.correlation import MAX_VOTERS, CorrelationTable, sampled
from poise.predict.mixed import HitFrac, mixed_TE


class LookaheadPrefetcher:
    """A seam listener that foresees each layer from the one before. ``passes``: those learnt from to their end.

    ``foresee``: is told of it, as ``ExpertStore.foresee`` is.
    """

    def __init__(self, lookahead: Lookahead, table: CorrelationTable, foresee: Callable[[int, Foreseen], None]) -> None:
        self.passes = 0
        self._lookahead = lookahead
        self._table = table
        self._foresee = foresee
        self._hits_L = [HitFrac() for _ in lookahead.experts_L]
        self._named_TK: Ints | None = None
        self._previous_TK: Ints | None = None

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``. Predicts first: what is learnt from this layer concerns the next pass."""
        voters_TK = sampled(chosen_TK, MAX_VOTERS)
        named_before_TK, self._named_TK = self._named_TK, None
        after = (layer + 1) % self._table.num_layers
        self._foresee(after, self._foreseen(after, hidden_TH, chosen_TK))
        if layer and named_before_TK is not None and len(named_before_TK) == len(voters_TK):
            self._hits_L[layer].observe(named_before_TK, voters_TK)
        learnt_TK = sampled(chosen_TK, MAX_LEARNT)
        self._table.observe(layer, learnt_TK, self._previous_TK if layer else None)
        self._previous_TK = learnt_TK
        self.passes += after == 0

    def _foreseen(self, after: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> Foreseen:
        """What these tokens will use of layer ``after``, the one behind that at hand; of many an even sample votes for all."""
        if not self._lookahead.predicts(after):
            chance_E, tokens_E = self._table.foresee(after, chosen_TK)
            return Foreseen(chance_E=chance_E, tokens_E=tokens_E)
        step = -(-len(chosen_TK) // MAX_VOTERS)
        named_TK = self._lookahead.choices_TK(after, hidden_TH[::step]).numpy(force=True)
        self._named_TK = named_TK
        table_TE = self._table.chances_TE(after, chosen_TK[::step])
        chances_TE = mixed_TE(named_TK, table_TE, self._hits_L[after].value)
        scale = np.float32(len(chosen_TK) / max(1, len(named_TK)))
        return Foreseen(
            chance_E=-np.expm1(np.log1p(-chances_TE).sum(axis=0) * scale), tokens_E=chances_TE.sum(axis=0) * scale
        )
