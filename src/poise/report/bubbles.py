"""Where the time of a run went, from its timeline: what computed, what was read, and every bubble by its name.

A bubble is time in which the compute thread waits, or in which nothing is read or written. Waiting while the disk is at work
all the time is the disk's limit, not a fault of the schedule: see both columns. On either, busy time and bubbles add up to
the time that passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from poise.spec.timeline import COMPUTE, DISK, Span

WAIT = "wait: "
IDLE = "idle: "
TRANSFERS = ("read", "write")
"""How the names of what a disk does begin."""
BETWEEN_PASSES = "sampling, new batches"
BETWEEN_READS = "idle: between reads"
Interval = tuple[int, int]


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


def time_shares(spans: Sequence[Span], *, within: tuple[int, int] | None = None) -> TimeShares:
    """Shares of the time from the first span's begin to the last one's end, or ``within`` (begin and end, nanoseconds)."""
    if not spans:
        return TimeShares(elapsed_s=0.0, compute_s={}, disk_busy_s=0.0, disk_bytes=0, bubbles_s={})
    begin, end = within or (min(span.begin_ns for span in spans), max(span.end_ns for span in spans))
    compute: dict[str, float] = defaultdict(float)
    bubbles: dict[str, float] = defaultdict(float)
    on_compute = [span for span in spans if span.track == COMPUTE]
    for name, own_ns in _own_times(on_compute, begin, end):
        if name.startswith(WAIT):
            bubbles[f"compute {name}"] += own_ns / 1e9
        else:
            compute[name] += own_ns / 1e9
    computing = _union([(span.begin_ns, span.end_ns) for span in on_compute], begin, end)
    compute[BETWEEN_PASSES] = (end - begin - _length(computing)) / 1e9
    on_disk = [span for span in spans if span.track.startswith(DISK)]
    transfers = [span for span in on_disk if span.name.startswith(TRANSFERS)]
    busy = _union([(span.begin_ns, span.end_ns) for span in transfers], begin, end)
    for name, idle_ns in _named_gaps(
        busy, [span for span in on_disk if not span.name.startswith(TRANSFERS)], begin, end
    ):
        bubbles[f"disk {name}"] += idle_ns / 1e9
    return TimeShares(
        elapsed_s=(end - begin) / 1e9,
        compute_s=dict(compute),
        disk_busy_s=_length(busy) / 1e9,
        disk_bytes=sum(int(span.detail.get("bytes", 0)) for span in transfers if begin <= span.begin_ns < end),
        bubbles_s=dict(bubbles),
    )


def _own_times(spans: Iterable[Span], begin: int, end: int) -> Iterator[tuple[str, int]]:
    """Each span's time less that of the spans inside it, clipped. Spans lie inside each other or apart."""
    open_spans: list[list[Any]] = []  # [name, end, own time so far, reached]

    def close(until: int) -> Iterator[tuple[str, int]]:
        while open_spans and open_spans[-1][1] <= until:
            name, last, own, reached = open_spans.pop()
            yield name, own + last - reached
            if open_spans:
                open_spans[-1][3] = last

    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        first, last = max(span.begin_ns, begin), min(span.end_ns, end)
        if first >= last:
            continue
        yield from close(first)
        if open_spans:
            open_spans[-1][2] += first - open_spans[-1][3]
            open_spans[-1][3] = first
        open_spans.append([span.name, last, 0, first])
    yield from close(end)


def _named_gaps(busy: Sequence[Interval], reasons: Sequence[Span], begin: int, end: int) -> Iterator[tuple[str, int]]:
    """The time between busy intervals under the names of the spans that lie there; what nobody named is between reads.

    What a reader thread makes of the bytes counts where nobody says why nothing is read.
    """
    taken = list(busy)
    for is_idle in (True, False):
        chosen = [span for span in reasons if span.name.startswith(IDLE) == is_idle]
        free = _gaps(taken, begin, end)
        for span, (first, last) in _overlaps(sorted(chosen, key=lambda span: span.begin_ns), free):
            yield span.name if is_idle else f"{IDLE}{span.name}", last - first
        taken = _union([*taken, *((span.begin_ns, span.end_ns) for span in chosen)], begin, end)
    yield BETWEEN_READS, (end - begin) - _length(taken)


def _overlaps(spans: Sequence[Span], free: Sequence[Interval]) -> Iterator[tuple[Span, Interval]]:
    """What each span covers of the free intervals, and no earlier span does; both in order."""
    place, reached = 0, 0
    for span in spans:
        while place < len(free) and free[place][1] <= max(span.begin_ns, reached):
            place += 1
        for first, last in free[place:]:
            if first >= span.end_ns:
                break
            covered = max(first, span.begin_ns, reached), min(last, span.end_ns)
            if covered[0] < covered[1]:
                yield span, covered
        reached = max(reached, span.end_ns)


def _union(intervals: Iterable[Interval], begin: int, end: int) -> list[Interval]:
    """Intervals clipped to [begin, end), those that meet made one, in order."""
    found: list[Interval] = []
    for first, last in sorted((max(first, begin), min(last, end)) for first, last in intervals):
        if first >= last:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def _gaps(busy: Sequence[Interval], begin: int, end: int) -> list[Interval]:
    edges = [begin, *(edge for interval in busy for edge in interval), end]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def _length(intervals: Iterable[Interval]) -> int:
    return sum(last - first for first, last in intervals)
