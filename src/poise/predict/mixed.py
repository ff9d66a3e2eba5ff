"""Chances of experts from two sources: choices that a lookahead names, and a correlation table for all that it does not.

A named expert is chosen as often as naming was right lately (``hit_frac``, learnt from the routing as it comes); what is left
of a token's choices goes to the others as the table shares it. So the chances of a token sum to its choices, and a lookahead
that proves to be bad counts for little. Letters: T tokens, K choices, E experts. Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FIRST_HIT_FRAC = 0.75
"""Before anything was seen: what PROBE reports of frozen routers."""
HIT_WEIGHT_TOKENS = 512
"""After so many tokens an observation counts about a third."""
MAX_CHANCE = 0.98


def mixed_TE(named_TK: Ints, table_TE: Floats, hit_frac: float) -> Floats:
    """Each token's chance of choosing each expert. ``named_TK``: an index of E or more names none of them."""
    tokens, experts = table_TE.shape
    named_TE = np.zeros((tokens, experts + 1), dtype=bool)
    np.put_along_axis(named_TE, np.minimum(named_TK, experts), True, axis=1)
    named_TE = named_TE[:, :experts]
    others_TE = np.where(named_TE, np.float32(0), table_TE)
    left = np.float32((1.0 - hit_frac) * named_TK.shape[1])
    others_TE *= left / np.maximum(others_TE.sum(axis=1, keepdims=True), np.float32(1e-6))
    return np.asarray(np.minimum(np.where(named_TE, np.float32(hit_frac), others_TE), MAX_CHANCE), dtype=np.float32)


class HitFrac:
    """How often an expert that was named for a token is then chosen by it, at one layer; a running mean over tokens."""

    def __init__(self) -> None:
        self.value = FIRST_HIT_FRAC

    def observe(self, named_TK: Ints, chosen_TK: Ints) -> None:
        """The same tokens' names and choices."""
        hit_frac = float((chosen_TK[:, :, None] == named_TK[:, None, :]).any(axis=2).mean())
        keep = float(np.exp(-len(named_TK) / HIT_WEIGHT_TOKENS))
        self.value = keep * self.value + (1.0 - keep) * hit_frac
