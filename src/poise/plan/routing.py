"""Where tokens go, as chances: how many experts a pass uses, and how many of those are not in memory. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """``choice_LE[l, e]``: the chance that a token of layer l chooses expert e; each row sums to top-k."""

    choice_LE: Floats

    @classmethod
    def uniform(cls, experts_L: Sequence[int], top_k: int) -> Routing:
        """Every expert alike: what is assumed where nothing was recorded."""
        choice_LE = np.zeros((len(experts_L), max(experts_L)))
        for layer, experts in enumerate(experts_L):
            choice_LE[layer, :experts] = min(1.0, top_k / experts)
        return cls(choice_LE=choice_LE)

    @classmethod
    def recorded(cls, counts_LE: npt.ArrayLike, top_k: int) -> Routing:
        """From how often each expert was chosen. A layer without counts has uniform routing."""
        counts = np.asarray(counts_LE, dtype=np.float64)
        total_L1 = counts.sum(axis=1, keepdims=True)
        share = np.where(total_L1 > 0, counts / np.maximum(total_L1, 1.0), 1.0 / counts.shape[1])
        return cls(choice_LE=np.minimum(1.0, share * top_k))

    @property
    def top_k(self) -> float:
        """Experts per token."""
        return float(self.choice_LE.sum() / len(self.choice_LE))

    def used_LE(self, tokens: int) -> Floats:
        """The chance that a pass of ``tokens`` tokens uses each expert at all, tokens choosing independently."""
        return np.asarray(1.0 - (1.0 - self.choice_LE) ** tokens)

    def missing_S(self, tokens: int) -> Floats:
        """Experts that a pass uses and that are not in memory, by how many of the likeliest stay there, from none to all."""
        used = np.sort(self.used_LE(tokens), axis=None)
        return np.concatenate([np.cumsum(used)[::-1], [0.0]])

    def active_and_missing(self, tokens: int, resident: int) -> tuple[float, float]:
        """Experts that a pass uses, and those of them not in memory when the likeliest ``resident`` stay there."""
        missing_S = self.missing_S(tokens)
        return float(missing_S[0]), float(missing_S[min(resident, len(missing_S) - 1)])
