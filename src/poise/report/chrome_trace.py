"""A timeline as a file in the Chrome trace event format, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.spec.timeline import Span
from poise.spec.whole_file import write_whole


def chrome_trace(spans: Sequence[Span], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One thread per track, times in microseconds from the first span's begin; ``facts`` about the run as metadata."""
    return _trace([("", spans)]) | {"otherData": dict(facts or {})}


def chrome_trace_of_ranks(spans_R: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """One process per rank, one thread per track in each; all spans are of one clock."""
    return _trace([(f"rank {rank}", spans) for rank, spans in enumerate(spans_R)])


def write_chrome_trace(path: Path, trace: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(trace))


def _trace(processes: Sequence[tuple[str, Sequence[Span]]]) -> dict[str, Any]:
    """``processes``: names, none where there is but one, and spans."""
    start = min((span.begin_ns for _, spans in processes for span in spans), default=0)
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for pid, (process, spans) in enumerate(processes, start=1):
        tracks = {track: number for number, track in enumerate(sorted({span.track for span in spans}))}
        if process:
            names.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}})
            names.append({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}})
        names += [
            {"ph": "M", "pid": pid, "tid": number, "name": "thread_name", "args": {"name": track}}
            for track, number in tracks.items()
        ]
        events += [
            {
                "ph": "X",
                "pid": pid,
                "tid": tracks[span.track],
                "name": span.name,
                "ts": (span.begin_ns - start) / 1e3,
                "dur": (span.end_ns - span.begin_ns) / 1e3,
                "args": dict(span.detail),
            }
            for span in sorted(spans, key=lambda span: (span.begin_ns, span.end_ns))
        ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}
