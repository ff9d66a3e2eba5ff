"""Where the time of a run went, from its timeline: what computed, what was read, and every bubble by its name.

A bubble is time in which the compute thread waits, or in which no reader reads. Waiting while the disk is at work all the
time is the disk's limit, not a fault of the schedule: see both columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from poise.spec.timeline import COMPUTE, DISK, Span

WAIT = "wait: "
IDLE = "idle: "


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeShares:
    """Seconds. ``compute_s`` and ``bubbles_s`` are by name; ``disk_busy_s`` is when at least one read was under way."""

    elapsed_s: float
    compute_s: dict[str, float]
    disk_busy_s: float
    disk_bytes: int
    bubbles_s: dict[str, float]

    @property
    def computing_s(self) -> float:
        """Seconds in which the compute thread worked."""
        return sum(self.compute_s.values())

    @property
    def bottleneck_frac(self) -> float:
        """Share of the time in which the busier of disk and compute was busy: 1 is the limit of this run's own work."""
        return max(self.computing_s, self.disk_busy_s) / self.elapsed_s if self.elapsed_s else 0.0


def time_shares(spans: Sequence[Span]) -> TimeShares:
    """Shares of the time from the first span's begin to the last one's end."""
    if not spans:
        return TimeShares(elapsed_s=0.0, compute_s={}, disk_busy_s=0.0, disk_bytes=0, bubbles_s={})
    begin, end = min(span.begin_ns for span in spans), max(span.end_ns for span in spans)
    compute: dict[str, float] = defaultdict(float)
    bubbles: dict[str, float] = defaultdict(float)
    reads = [span for span in spans if span.track.startswith(DISK) and not span.name.startswith(IDLE)]
    for span in spans:
        seconds = (span.end_ns - span.begin_ns) / 1e9
        if span.name.startswith(IDLE):
            bubbles[f"disk {span.name}"] += seconds
        elif span.track == COMPUTE and span.name.startswith(WAIT):
            bubbles[f"compute {span.name}"] += seconds
        elif span.track == COMPUTE:
            compute[span.name] += seconds
    computing = _covered_ns((span.begin_ns, span.end_ns) for span in spans if span.track == COMPUTE)
    compute["routing, sums, sampling"] = (end - begin - computing) / 1e9
    return TimeShares(
        elapsed_s=(end - begin) / 1e9,
        compute_s=dict(compute),
        disk_busy_s=_covered_ns((span.begin_ns, span.end_ns) for span in reads) / 1e9,
        disk_bytes=sum(int(span.detail.get("bytes", 0)) for span in reads),
        bubbles_s=dict(bubbles),
    )


def _covered_ns(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union."""
    covered, reached = 0, -1
    for begin, end in sorted(intervals):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
