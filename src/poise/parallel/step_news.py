"""What ranks tell each other at each MoE layer before tokens travel: one row of whole numbers each, in one exchange.

True counts of this layer, predicted ones of the next, which replicas have come, and what the planner needs to know of ranks.
All ranks hear the same, so that all come to the same plan. Letters: R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from poise.parallel.group import RankGroup

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankNews:
    """``layer``: where the rank stands, with so many ``tokens`` of its own. ``arithmetic``: as ``plan.compiled`` has it: ranks
    with another one may divide tokens differently. ``plan``: a digest of its plan for this layer, 0 without one; ``pays``:
    tokens may go elsewhere than to their first homes. ``arrived``: bits, by the plan's replicas for this rank, of those that
    are here.

    ``window_us``: how long its link was free for the next layer's replicas, the last time; ``fetch_kb_s``: how fast they come,
    0 if it is not known; ``copy_us``: processor time that one of them takes from the rank's experts, in or out;
    ``look_us``: what predicting, planning and dividing take in a layer; ``trust_permille``: see ``parallel.plan_trust``.
    ``in_permille``, ``out_permille``: rows over (token, expert) pairs that travel.
    ``pairs``, ``active``, ``compute_us``: what it computed in the layer before, all 0 for none.
    ``late``: it has begun the layer to come, so that nobody need plan it; only where a thread of its own tells this.
    """

    layer: int
    tokens: int = 0
    arithmetic: int = 0
    plan: int = 0
    pays: bool = False
    arrived: int = 0
    window_us: int = 0
    fetch_kb_s: int = 0
    copy_us: int = 0
    look_us: int = 0
    trust_permille: int = 1000
    in_permille: int = 1000
    out_permille: int = 1000
    pairs: int = 0
    active: int = 0
    compute_us: int = 0
    late: bool = False


NUM_FIELDS = len(fields(RankNews))
_values = attrgetter(*(each.name for each in fields(RankNews)))
_PLACE = {each.name: place for place, each in enumerate(fields(RankNews))}


def told(news: RankNews, own_E: Ints, predicted_E: Ints, rows_R: Sequence[int]) -> Ints:
    """A rank's row. ``rows_R``: rows that it sends to each rank if experts at home compute everything."""
    experts = len(own_E)
    row = np.empty(NUM_FIELDS + 2 * experts + len(rows_R), dtype=np.int64)
    row[:NUM_FIELDS] = _values(news)
    row[NUM_FIELDS : NUM_FIELDS + experts] = own_E
    row[NUM_FIELDS + experts : NUM_FIELDS + 2 * experts] = predicted_E
    row[NUM_FIELDS + 2 * experts :] = rows_R
    return row


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepNews:
    """Of all ranks: ``counts_RE`` of this layer, ``pairs`` in all, ``predicted_RE`` of the next, ``rows_RR`` from rank (row) to
    rank (column)."""

    numbers_RF: Ints
    counts_RE: Ints
    pairs: int
    predicted_RE: Ints
    rows_RR: Ints

    @property
    def fracs(self) -> tuple[Floats, Floats]:
        """Rows that travel over pairs that do, into and out of each rank."""
        return self.of("in_permille") / 1e3, self.of("out_permille") / 1e3

    @property
    def layer(self) -> int:
        """Where all ranks stand."""
        layers = set(self.of("layer").tolist())
        assert len(layers) == 1, f"ranks stand at different MoE layers: {sorted(layers)}"
        return int(layers.pop())

    @classmethod
    def heard(cls, rows_RN: Ints) -> Self:
        """From all ranks' rows."""
        ranks, width = rows_RN.shape
        experts = (width - NUM_FIELDS - ranks) // 2
        counts_RE = rows_RN[:, NUM_FIELDS : NUM_FIELDS + experts]
        return cls(
            numbers_RF=rows_RN[:, :NUM_FIELDS],
            counts_RE=counts_RE,
            pairs=int(counts_RE.sum()),
            predicted_RE=rows_RN[:, NUM_FIELDS + experts : NUM_FIELDS + 2 * experts],
            rows_RR=rows_RN[:, NUM_FIELDS + 2 * experts :],
        )

    def is_same(self, field: str) -> bool:
        """Whether all ranks tell the same there."""
        return len(set(self.of(field).tolist())) == 1

    def of(self, field: str) -> Ints:
        """One of the fields of ``RankNews``, of each rank."""
        return self.numbers_RF[:, _PLACE[field]]


def exchanged(
    group: RankGroup, own: RankNews, own_E: Ints, predicted_E: Ints, rows_R: Sequence[int] | None = None
) -> StepNews:
    """All ranks at once, at one layer: what each ``told``. ``rows_R``: None for none. Raises RankLostError."""
    row = told(own, own_E, predicted_E, rows_R or (0,) * group.num_ranks)
    heard_RN = group.all_gather(torch.from_numpy(row).to(group.device))
    news = StepNews.heard(heard_RN.cpu().numpy())
    assert news.layer == own.layer, "ranks stand at different MoE layers"
    return news
