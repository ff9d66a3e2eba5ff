"""Which experts were guessed right, and the guesses of a pass until its routers have spoken.

Of K experts of a layer that were named before its routers spoke: those that some token of the pass chose, and those that are
among the K with the most tokens. Experts tied at the K-th place count by their chance of being among them, so that a guess
without knowledge is not better or worse for how ties are broken. Letters: N passes, T tokens, K named or chosen, E experts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.predict.hits import Hits

Ints = npt.NDArray[np.integer[Any]]


def hits_in_passes(counts_NE: Ints, named_NK: Ints) -> Hits:
    """``counts_NE``: tokens that chose each expert. ``named_NK``: K different experts in each pass, 1 <= K <= E."""
    named = named_NK.shape[1]
    counts_NK = np.take_along_axis(counts_NE, named_NK, axis=1)
    last_N1 = -np.sort(-counts_NE, axis=1)[:, named - 1 : named]
    above_N1 = (counts_NE > last_N1).sum(axis=1, keepdims=True)
    tied_N1 = (counts_NE == last_N1).sum(axis=1, keepdims=True)
    chance_NK = np.where(counts_NK > last_N1, 1.0, np.where(counts_NK == last_N1, (named - above_N1) / tied_N1, 0.0))
    used_NK = counts_NK > 0
    return Hits(named=counts_NK.size, used=int(used_NK.sum()), hottest=float((chance_NK * used_NK).sum()))


def hits_in_layer(counts_E: Ints, named: Collection[int], choice_E: npt.NDArray[np.bool_]) -> Hits:
    """Of one layer in one pass. ``choice_E``: the experts that could be named, among them all that were; the hottest are
    sought among these, as one that was in memory anyway needed no guess."""
    if not named:
        return Hits()
    (place,) = np.nonzero(choice_E)
    named_K = np.searchsorted(place, np.fromiter(named, dtype=np.int64, count=len(named)))
    return hits_in_passes(counts_E[place][None], named_K[None])


class Guesses:
    """Experts that were read ahead, from when they are until the routers of their layer have spoken, which judges them.

    Keys are (MoE layer, expert). An expert counts once for a layer's turn, also if it left memory before it and came again.
    """

    def __init__(self) -> None:
        self._named: dict[int, set[int]] = {}
        self._choice_E: npt.NDArray[np.bool_] | None = None

    def add(self, key: tuple[int, int]) -> None:
        """The expert is read though no router has asked for it."""
        self._named.setdefault(key[0], set()).add(key[1])

    def enter(self, layer: int, absent_E: npt.NDArray[np.bool_]) -> None:
        """The routers of ``layer`` begin to speak. ``absent_E``: its experts that are not in memory nor on their way."""
        self._choice_E = absent_E.copy()
        self._choice_E[list(self._named.get(layer, ()))] = True

    def judge(self, layer: int, chosen_TK: Ints) -> Hits:
        """All have spoken. ``chosen_TK``: the experts that the pass's tokens chose; one that the layer has not is masked."""
        named = self._named.pop(layer, set())
        choice_E, self._choice_E = self._choice_E, None
        if not named or choice_E is None:
            return Hits()
        experts = len(choice_E)
        counts_E = np.bincount(np.minimum(chosen_TK, experts).ravel(), minlength=experts + 1)[:experts]
        return hits_in_layer(counts_E, named, choice_E)

    def forget(self) -> None:
        """The pass was aborted: nothing of it is judged."""
        self._named.clear()
        self._choice_E = None
