"""What is to be fetched for one layer, how far it is, and when it was at work: in parts, suspended between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from poise.parallel.replica_staging import Landing
from poise.spec.timeline import PREFETCH, Span, Timeline


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wanted:
    """A replica that is to come from rank ``source`` into ``run``, and from there on by its ``landing``, if it has one."""

    expert: int
    source: int
    run: memoryview
    landing: Landing | None = None

    @property
    def has_landed(self) -> bool:
        return self.landing is None or self.landing.is_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Which of the wanted replicas are here; the bytes that came for all of them; how long the window was open for them."""

    arrived: tuple[bool, ...]
    nbytes: int
    busy_s: float


class Fetch:
    """One layer's replicas, one after the other. ``is_over``: they are all here, or no more are wanted."""

    def __init__(self, layer: int, wanted: Sequence[Wanted], timeline: Timeline | None) -> None:
        self.layer, self.wanted = layer, wanted
        self.is_over = not wanted
        self.place, self.offset = 0, 0
        """Which replica is next, and from where on."""
        self._arrived = [False] * len(wanted)
        self._nbytes, self._busy_ns = 0, 0
        self._timeline = timeline
        self.window = -1
        """In which it is at work; -1: in none."""
        self._began_ns, self._stopped_ns = 0, 0
        self._parts, self._part_bytes = 0, 0

    @property
    def fetched(self) -> Fetched:
        landed = zip(self._arrived, self.wanted, strict=True)
        arrived = tuple(came and each.has_landed for came, each in landed)
        return Fetched(arrived=arrived, nbytes=self._nbytes, busy_s=self._busy_ns / 1e9)

    def came(self, nbytes: int) -> None:
        """So many bytes of the replica at ``place``."""
        self._nbytes += nbytes
        self._part_bytes += nbytes
        self.offset += nbytes
        if self.offset == len(self.wanted[self.place].run):
            self._arrived[self.place] = not self.is_over
            landing = self.wanted[self.place].landing
            if landing is not None and not self.is_over:
                landing.all_here()
            self.skip()

    def land(self) -> None:
        """Waits for copies that have begun."""
        for each in self.wanted:
            if each.landing is not None:
                each.landing.wait()

    def skip(self) -> None:
        """No more of the replica at ``place``."""
        self.place, self.offset = self.place + 1, 0
        self.is_over |= self.place == len(self.wanted)

    def go(self, window: int, suspended_ns: int) -> None:
        """At work in the ``window``-th window; the one before ended at ``suspended_ns``."""
        if self.window == window:
            return
        if self.window >= 0:
            self.stop(suspended_ns)
        now_ns = perf_counter_ns()
        if self._timeline is not None and self._parts:
            self._timeline.spans.append(Span(PREFETCH, "suspended", self._stopped_ns, now_ns, {"layer": self.layer}))
        self.window, self._began_ns = window, now_ns
        self._parts += 1

    def stop(self, at_ns: int) -> None:
        """Not at work since then: suspended, or over."""
        if self.window < 0:
            return
        self.window, self._stopped_ns = -1, max(at_ns, self._began_ns)
        self._busy_ns += self._stopped_ns - self._began_ns
        if self._timeline is not None:
            experts = " ".join(str(each.expert) for each in self.wanted)
            detail: dict[str, int | str] = {"layer": self.layer, "experts": experts, "bytes": self._part_bytes}
            name = f"fetch, part {self._parts}"
            self._timeline.spans.append(Span(PREFETCH, name, self._began_ns, self._stopped_ns, detail))
        self._part_bytes = 0
