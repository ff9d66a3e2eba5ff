"""A timeline as a file in the Chrome trace event format, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poise.spec.timeline import Span
from poise.spec.whole_file import write_whole


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """One thread per track, times in microseconds from the first span's begin."""
    tracks = {track: number for number, track in enumerate(sorted({span.track for span in spans}))}
    start = min((span.begin_ns for span in spans), default=0)
    names = [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
        for track, number in tracks.items()
    ]
    events = [
        {
            "ph": "X",
            "pid": 1,
            "tid": tracks[span.track],
            "name": span.name,
            "ts": (span.begin_ns - start) / 1e3,
            "dur": (span.end_ns - span.begin_ns) / 1e3,
            "args": dict(span.detail),
        }
        for span in sorted(spans, key=lambda span: (span.begin_ns, span.end_ns))
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def write_chrome_trace(path: Path, spans: Sequence[Span]) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(chrome_trace(spans)))
