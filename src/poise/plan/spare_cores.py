"""Whether every rank has a core beside those that it computes with: then a thread of its own may look ahead (decision 061).

Numbers of all ranks in, the same answer on all of them out. Cores that several ranks of a host may use are shared among them
evenly, as is what a control group allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

NEEDED_CORES = 1.0
"""Beside those that compute. All that runs there takes less than a tenth of a core: predicting and planning, moving replicas,
and learning, which keeps to its own share of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCores:
    """``host``: which machine it is on; ``cores``: numbers of those that it may run on; ``quotas``: by control group (a name
    that is the same for all who are in it), of how many cores the group may have the time. ``threads``: that compute."""

    host: str
    cores: tuple[int, ...]
    quotas: Mapping[str, float]
    threads: int


def spare_cores_R(ranks: Sequence[RankCores]) -> tuple[float, ...]:
    """Of each rank, below 0 where it computes with more threads than it has cores."""
    on_core = Counter((rank.host, core) for rank in ranks for core in rank.cores)
    in_group = Counter((rank.host, group) for rank in ranks for group in rank.quotas)
    spare = []
    for rank in ranks:
        allowed = [fsum(1.0 / on_core[rank.host, core] for core in rank.cores)]
        allowed += [cores / in_group[rank.host, group] for group, cores in rank.quotas.items()]
        spare.append(min(allowed) - rank.threads)
    return tuple(spare)


def can_look_aside(ranks: Sequence[RankCores]) -> bool:
    """Whether all ranks have ``NEEDED_CORES`` to spare."""
    return min(spare_cores_R(ranks)) >= NEEDED_CORES - 1e-9
