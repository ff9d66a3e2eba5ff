"""Chances of experts from two sources: choices that a lookahead names, and a correlation table for all that it does not.

A named expert is chosen as often as naming was right lately; what is left of a token's choices goes to the others as the table
shares it. So the chances of a token sum to its choices, and a lookahead that proves to be bad counts for little. An expert
that lately got more tokens than was expected of it is then given that much more: counts of many tokens would else be off to
one side.
Letters: T tokens, K choices, E experts. Pure: no clock, no random state.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FIRST_HIT_FRAC = 0.75
"""Before anything was seen: what PROBE reports of frozen routers."""
MEMORY_TOKENS = 2048
"""After so many tokens an observation counts about a third."""
PRIOR_TOKENS = 8.0
"""Each expert begins as if it had been expected, and had come, for so many tokens."""
MAX_CHANCE = 0.98


class Mixture:
    """One layer's: mixes, and learns from what came how much to trust what was named."""

    def __init__(self, num_experts: int) -> None:
        self.hit_frac = FIRST_HIT_FRAC
        self._expected_E = np.full(num_experts, PRIOR_TOKENS)
        self._came_E = np.full(num_experts, PRIOR_TOKENS)

    @property
    def correction_E(self) -> Floats:
        """Tokens that came over tokens that were expected, lately, by expert."""
        return np.asarray(self._came_E / self._expected_E, dtype=np.float32)

    def chances_TE(self, named_TK: Ints, table_TE: Floats) -> Floats:
        """Each token's chance of choosing each expert. ``named_TK``: an index of E or more names none of them."""
        return np.asarray(np.minimum(self._raw_TE(named_TK, table_TE) * self.correction_E, MAX_CHANCE))

    def observe(self, named_TK: Ints, table_TE: Floats, chosen_TK: Ints) -> None:
        """What the same tokens chose, of whom this had been said."""
        experts = table_TE.shape[1]
        keep = float(np.exp(-len(named_TK) / MEMORY_TOKENS))
        came_E = np.bincount(np.minimum(chosen_TK, experts).ravel(), minlength=experts + 1)[:experts]
        self._expected_E = keep * (self._expected_E - PRIOR_TOKENS) + PRIOR_TOKENS
        self._expected_E += self._raw_TE(named_TK, table_TE).sum(axis=0)
        self._came_E = keep * (self._came_E - PRIOR_TOKENS) + PRIOR_TOKENS + came_E
        hit_frac = float((chosen_TK[:, :, None] == named_TK[:, None, :]).any(axis=2).mean())
        self.hit_frac = keep * self.hit_frac + (1.0 - keep) * hit_frac

    def _raw_TE(self, named_TK: Ints, table_TE: Floats) -> Floats:
        """Before experts are corrected one by one."""
        tokens, experts = table_TE.shape
        named_TE = np.zeros((tokens, experts + 1), dtype=bool)
        np.put_along_axis(named_TE, np.minimum(named_TK, experts), True, axis=1)
        named_TE = named_TE[:, :experts]
        others_TE = np.where(named_TE, np.float32(0), table_TE)
        left = np.float32((1.0 - self.hit_frac) * named_TK.shape[1])
        others_TE *= left / np.maximum(others_TE.sum(axis=1, keepdims=True), np.float32(1e-6))
        return np.asarray(np.where(named_TE, np.float32(self.hit_frac), others_TE), dtype=np.float32)
