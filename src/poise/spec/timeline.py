"""What a timeline is: spans of time on tracks, such as the compute thread or a disk reader. Data only; no drawing here.

Recording costs about a microsecond a span and may be done by any thread. Times are ``time.perf_counter_ns``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns

COMPUTE = "compute"
DISK = "disk"
COPY = "copies to the device"
EXCHANGE = "exchange"
MIGRATION = "migration"
PREFETCH = "prefetch"
AHEAD = "ahead"


@dataclass(frozen=True, slots=True)
class Span:
    """``name`` ran on ``track`` from ``begin_ns`` to ``end_ns``; ``detail`` holds numbers such as layer, expert, bytes."""

    track: str
    name: str
    begin_ns: int
    end_ns: int
    detail: Mapping[str, int | str] = field(default_factory=dict)


class Timeline:
    """Spans in the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, track: str, name: str, begin_ns: int, **detail: int | str) -> None:
        """A span that ends now."""
        self.spans.append(Span(track, name, begin_ns, perf_counter_ns(), detail))

    @contextmanager
    def span(self, track: str, name: str, **detail: int | str) -> Iterator[None]:
        """A span around a block, also where it raises."""
        begin_ns = perf_counter_ns()
        try:
            yield
        finally:
            self.add(track, name, begin_ns, **detail)


class Gaps:
    """Names the time in which nothing happens on a track, as far as whoever keeps it busy knows. One caller at a time."""

    def __init__(self, timeline: Timeline, track: str, prefix: str, reason: str) -> None:
        """A gap begins now, for ``reason``; names are ``prefix`` and the reason."""
        self._timeline, self._track, self._prefix = timeline, track, prefix
        self._since: tuple[int, str] | None = (perf_counter_ns(), reason)

    def note(self, reason: str | None, **detail: int | str) -> None:
        """From now on the track is idle for ``reason``; None: it is busy. A gap whose reason changes becomes two."""
        if self._since is not None and reason == self._since[1]:
            return
        if self._since is not None:
            self._timeline.add(self._track, self._prefix + self._since[1], self._since[0], **detail)
        self._since = None if reason is None else (perf_counter_ns(), reason)

    def cut(self) -> None:
        """Writes down the gap so far, if there is one, and goes on with it."""
        if self._since is not None:
            self._timeline.add(self._track, self._prefix + self._since[1], self._since[0])
            self._since = perf_counter_ns(), self._since[1]
