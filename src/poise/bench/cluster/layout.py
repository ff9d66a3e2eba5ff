"""What a cluster in a box looks like: how fast each rank is, how much memory it has, how fast its link is.

Plain numbers; ``cluster.py`` makes them real.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GBIT_PER_S = 125_000_000
"""Bytes per second of a link that is sold as one gigabit per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """One rank. ``cores``: the share of processor time it may use (0.4 of a core); None: no quota.

    ``core``: position among the cores of this process that it is pinned to, and ``pinned`` how many from there on; None: it may
    run on any. ``memory_bytes`` counts its page cache too; None: no cap. ``threads``: what OpenMP and torch compute with.
    """

    cores: float | None = None
    core: int | None = None
    pinned: int = 1
    memory_bytes: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        assert self.cores is None or self.cores > 0, f"a share of processor time is positive, not {self.cores}"
        assert self.memory_bytes is None or self.memory_bytes > 0, f"a cap is positive, not {self.memory_bytes}"
        assert self.pinned > 0, f"a rank is pinned to at least one core, not {self.pinned}"
        assert self.threads > 0, f"a rank computes with at least one thread, not {self.threads}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterLayout:
    """``link_bytes_per_s``: of every rank's link, each way; None: the ranks talk over loopback, unlimited.

    ``copy_engines``: the threads that move experts (replicas, or what EPLB and ViBE rearrange) do not count in the ranks'
    shares, as a GPU's copy engine does not keep it from computing.
    """

    name: str
    ranks: tuple[RankLimits, ...]
    link_bytes_per_s: int | None = None
    copy_engines: bool = False

    def __post_init__(self) -> None:
        assert 0 < len(self.ranks) <= 250, f"a cluster in a box has 1 to 250 ranks, not {len(self.ranks)}"
        assert self.link_bytes_per_s is None or self.link_bytes_per_s > 0, "a link's rate is positive"

    def with_link(self, bytes_per_s: int) -> ClusterLayout:
        """The same ranks, each behind a link of this rate in a network of their own."""
        gbit_per_s = bytes_per_s / GBIT_PER_S
        return replace(self, name=f"{self.name}, {gbit_per_s:g} Gbit/s", link_bytes_per_s=bytes_per_s)


def eight_ranks(cores: float = 0.17) -> ClusterLayout:
    """Eight like ranks that share 1.36 cores, with copy engines."""
    return ClusterLayout(name="8 equal ranks", ranks=(RankLimits(cores=cores),) * 8, copy_engines=True)


def two_ranks() -> ClusterLayout:
    """Two ranks with a core each."""
    return ClusterLayout(name="2 ranks", ranks=(RankLimits(core=0), RankLimits(core=1)))


def pinned_ranks(count: int, cores: int) -> ClusterLayout:
    """Ranks with ``cores`` real cores each that nobody shares; one thread computes, what else there is runs beside it."""
    ranks = tuple(RankLimits(core=cores * rank, pinned=cores) for rank in range(count))
    return ClusterLayout(name=f"{count} ranks of {cores} cores", ranks=ranks)


def four_unequal_ranks() -> ClusterLayout:
    """Four ranks that share 1.38 cores, the fastest 1.75 times as fast as the slowest.

    The sum stays far below two cores, so that ranks wait for their quota and not for each other.
    """
    return ClusterLayout(
        name="4 unequal ranks", ranks=tuple(RankLimits(cores=cores) for cores in (0.42, 0.38, 0.34, 0.24))
    )


def slow_link() -> ClusterLayout:
    """Two ranks with a core each behind links of 1 Gbit/s."""
    return two_ranks().with_link(GBIT_PER_S)
