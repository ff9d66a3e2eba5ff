"""Tells the store what the next layer will need by a lookahead predictor, instead of the correlation table or mixed with it.

The table goes on learning as it does alone (``engine.prefetcher``), and stands in for layers that no router can be asked
about, the first of the next pass among them (decision 044).
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
from poise.predict.mixed import Floats, Mixture


class LookaheadPrefetcher:
    """A seam listener that foresees each layer from the one before. ``passes``: those learnt from to their end.

    ``foresee``: is told of it, as ``ExpertStore.foresee`` is. With many tokens an even sample votes for all. ``mixes``: what is
    left of a token's choices goes to the other experts as the table shares it; else to all of them alike.
    """

    def __init__(
        self,
        lookahead: Lookahead,
        table: CorrelationTable,
        foresee: Callable[[int, Foreseen], None],
        *,
        mixes: bool = False,
    ) -> None:
        self.passes = 0
        self._mixes = mixes
        self._lookahead = lookahead
        self._table = table
        self._foresee = foresee
        self._mixtures = [Mixture(table.num_experts) for _ in lookahead.experts_L]
        self._said: tuple[Ints, Floats] | None = None
        self._previous_TK: Ints | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self._lookahead.name}, {'mixed with' if self._mixes else 'else'} the correlation table"

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``. Predicts first: what is learnt from this layer concerns the next pass."""
        said, self._said = self._said, None
        after = (layer + 1) % self._table.num_layers
        self._foresee(after, self._foreseen(after, hidden_TH, chosen_TK))
        voters_TK = sampled(chosen_TK, MAX_VOTERS)
        if layer and said is not None and len(said[0]) == len(voters_TK):
            self._mixtures[layer].observe(*said, voters_TK)
        learnt_TK = sampled(chosen_TK, MAX_LEARNT)
        self._table.observe(layer, learnt_TK, self._previous_TK if layer else None)
        self._previous_TK = learnt_TK
        self.passes += after == 0

    def _foreseen(self, after: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> Foreseen:
        """What these tokens will use of layer ``after``, the one behind that at hand."""
        if not self._lookahead.predicts(after):
            chance_E, tokens_E = self._table.foresee(after, chosen_TK)
            return Foreseen(chance_E=chance_E, tokens_E=tokens_E)
        step = -(-len(chosen_TK) // MAX_VOTERS)
        named_TK = self._lookahead.choices_TK(after, hidden_TH[::step]).numpy(force=True)
        table_TE = self._others_TE(after, chosen_TK[::step])
        self._said = named_TK, table_TE
        chances_TE = self._mixtures[after].chances_TE(named_TK, table_TE)
        scale = np.float32(len(chosen_TK) / max(1, len(named_TK)))
        return Foreseen(
            chance_E=-np.expm1(np.log1p(-chances_TE).sum(axis=0) * scale), tokens_E=chances_TE.sum(axis=0) * scale
        )

    def _others_TE(self, after: int, chosen_TK: Ints) -> Floats:
        """Shares of the experts that are not named, up to a factor."""
        if self._mixes:
            return self._table.chances_TE(after, chosen_TK)
        return np.ones((len(chosen_TK), self._table.num_experts), dtype=np.float32)
