"""What ranks tell each other at each MoE layer before tokens travel: one row of whole numbers each, in one exchange.

True counts of this layer, predicted ones of the next, which replicas have come, and what the planner needs to know of ranks.
All ranks hear the same, so that all come to the same plan. Letters: R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankNews:
    """``layer``: where the rank stands. ``plan``: a digest of its plan for this layer, 0 without one; ``arrived``: bits, by the
    plan's replicas for this rank, of those that are here.

    ``window_us``: how long its link was free for the next layer's replicas, the last time; ``fetch_kb_s``: how fast they come,
    0 if it is not known. ``in_permille``, ``out_permille``: rows over (token, expert) pairs that travel.
    ``pairs``, ``active``, ``compute_us``: what it computed in the layer before, all 0 for none.
    """

    layer: int
    plan: int = 0
    arrived: int = 0
    window_us: int = 0
    fetch_kb_s: int = 0
    in_permille: int = 1000
    out_permille: int = 1000
    pairs: int = 0
    active: int = 0
    compute_us: int = 0


NUM_FIELDS = len(fields(RankNews))
_PLACE = {each.name: place for place, each in enumerate(fields(RankNews))}


def told(news: RankNews, own_E: Ints, predicted_E: Ints) -> Ints:
    """A rank's row."""
    return np.concatenate([np.array(astuple(news), dtype=np.int64), own_E, predicted_E])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepNews:
    """Of all ranks: ``counts_RE`` of this layer, ``predicted_RE`` of the next."""

    numbers_RF: Ints
    counts_RE: Ints
    predicted_RE: Ints

    @classmethod
    def heard(cls, rows_RN: Ints) -> Self:
        """From all ranks' rows."""
        experts = (rows_RN.shape[1] - NUM_FIELDS) // 2
        numbers_RF, counts_RE, predicted_RE = np.split(rows_RN, [NUM_FIELDS, NUM_FIELDS + experts], axis=1)
        return cls(numbers_RF=numbers_RF, counts_RE=counts_RE, predicted_RE=predicted_RE)

    def of(self, field: str) -> Ints:
        """One of the fields of ``RankNews``, of each rank."""
        return self.numbers_RF[:, _PLACE[field]]
