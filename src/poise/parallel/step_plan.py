"""Replicas that were planned for one layer: which of them this rank fetches into which slots, and which have come to all.

Every rank makes the same plan from the same news. Should plans differ all the same, so do the digests that ranks tell each
other, and the layer runs without replicas. Letters: N replicas, R ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from poise.model.layout import Weights
from poise.parallel.replica_fetch import Fetched, Wanted
from poise.parallel.replica_slots import ReplicaSlots
from poise.parallel.step_news import Ints, StepNews
from poise.plan.balance import BalancePlan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """For ``layer``, into ``half`` of the slots of ``rank``. ``pays``: False where nothing is to come. ``mine``: expert and
    source of what comes here, in the order of its slots. ``link_share``: of this rank's link, that what comes here can have at
    the most, as its sources give to others as well. ``digest``: not 0."""

    layer: int
    rank: int
    half: int
    replica_N3: Ints
    pays: bool
    mine: tuple[tuple[int, int], ...] = field(init=False)
    link_share: float = field(init=False)
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        mine = tuple((expert, source) for expert, source, target in self.replica_N3.tolist() if target == self.rank)
        object.__setattr__(self, "mine", mine)
        object.__setattr__(self, "link_share", _link_share(self.replica_N3, self.rank))
        object.__setattr__(self, "digest", zlib.crc32(self.replica_N3.tobytes(), self.layer) + 1)

    @classmethod
    def of(cls, plan: BalancePlan, *, layer: int, rank: int, half: int) -> StepPlan:
        return cls(layer=layer, rank=rank, half=half, replica_N3=plan.replica_N3, pays=plan.pays)

    def wanted(self, slots: ReplicaSlots) -> list[Wanted]:
        """What to fetch, and where to."""
        return [
            Wanted(
                expert=expert,
                source=source,
                run=slots.view(self.half, place, layer=self.layer, expert=expert),
                landing=slots.landing(self.half, place, layer=self.layer, expert=expert),
            )
            for place, (expert, source) in enumerate(self.mine)
        ]

    def weights(self, slots: ReplicaSlots, came_N3: Ints) -> Mapping[int, Weights]:
        """By expert, of those among ``came_N3`` that are on this rank."""
        return {
            expert: slots.weights(self.half, place, layer=self.layer, expert=expert)
            for expert, place in self.places(came_N3).items()
        }

    def arrived_bits(self, fetched: Fetched) -> int:
        return sum(1 << place for place, here in enumerate(fetched.arrived) if here)

    def came(self, news: StepNews) -> Ints:
        """The replicas that are where they should be, by what all ranks tell: rows of ``replica_N3``."""
        if not len(self.replica_N3) or (news.of("plan") != self.digest).any():
            return self.replica_N3[:0]
        bits_R, seen_R = news.of("arrived").tolist(), [0] * len(news.numbers_RF)
        here_N = []
        for target in self.replica_N3[:, 2].tolist():
            here_N.append(bool(bits_R[target] >> seen_R[target] & 1))
            seen_R[target] += 1
        return self.replica_N3 if all(here_N) else np.asarray(self.replica_N3[np.array(here_N, dtype=bool)])

    def places(self, came_N3: Ints) -> Mapping[int, int]:
        """Expert to slot, of those among ``came_N3`` that are on this rank."""
        place_of = {expert: place for place, (expert, _) in enumerate(self.mine)}
        return {expert: place_of[expert] for expert, _, target in came_N3.tolist() if target == self.rank}


def _link_share(replica_N3: Ints, rank: int) -> float:
    """Replicas that come here, of those that the busiest of their links has to carry meanwhile; 1 where none come."""
    sources = replica_N3[replica_N3[:, 2] == rank, 1]
    most = max((int((replica_N3[:, 1] == source).sum()) for source in set(sources.tolist())), default=0)
    return len(sources) / max(len(sources), most) if len(sources) else 1.0
