"""One layer of one rank, drawn from an exported timeline: what computes, what travels, and the parts in which replicas come.

    python -m poise.report.split_phase timeline.json picture.png --rank 1

Needs matplotlib (``poise[report]``). ``timeline.json``: of `poise generate --expert-parallel --balance probe --timeline`. Drawn
is, of that rank's fetches in two parts or more, the one that brought most in both, from the dispatch before it to the one
behind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from poise.errors import UsageError

SIZE_INCHES, DOTS_PER_INCH = (7.2, 2.1), 160
TRACKS = ("exchange", "compute", "prefetch")
"""From top to bottom."""
COLOURS = {
    "counts": "tab:gray",
    "dispatch": "tab:red",
    "combine": "tab:orange",
    "attention": "tab:green",
    "expert": "tab:blue",
    "predict": "tab:purple",
    "fetch": "tab:cyan",
    "suspended": "0.88",
}
"""By how a span's name begins; others are not drawn."""
PART = "fetch, part "


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """``events``: a rank's, on ``TRACKS``, as (track, name, begin, seconds), times in seconds from the begin; while replicas
    for MoE ``layer`` come."""

    rank: int
    layer: int
    events: tuple[tuple[str, str, float, float], ...]
    seconds: float


def stretch_of(trace: Mapping[str, Any], rank: int) -> Stretch:
    """Raises UsageError where the rank is not in the trace, or none of its fetches came in parts."""
    named = {(event["pid"], event["tid"]): event["args"]["name"] for event in _of(trace, "thread_name")}
    pids = {event["args"]["name"]: event["pid"] for event in _of(trace, "process_name")}
    pid = pids.get(f"rank {rank}")
    if pid is None:
        raise UsageError(f"the timeline has no rank {rank}; it has: {', '.join(sorted(pids)) or 'no ranks'}")
    events = [
        (named[event["pid"], event["tid"]], event["name"], event["ts"] / 1e6, event["dur"] / 1e6, event["args"])
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event["pid"] == pid
    ]
    parts = [event for event in events if event[1].startswith(PART)]
    split = [
        (min(one[4]["bytes"], two[4]["bytes"]), one, two)
        for one, two in pairwise(parts)
        if two[1] == f"{PART}2" and min(one[4]["bytes"], two[4]["bytes"])
    ]
    if not split:
        raise UsageError(f"no replica came to rank {rank} in two parts; try another rank")
    _, one, two = max(split, key=lambda each: each[0])
    sent = [event for event in events if event[1] == "dispatch"]
    begin_s = max((event[2] for event in sent if event[2] <= one[2]), default=one[2])
    end_s = min((event[2] + event[3] for event in sent if event[2] >= two[2]), default=two[2] + two[3])
    shown = tuple(
        (track, name, at_s - begin_s, took_s)
        for track, name, at_s, took_s, _ in events
        if track in TRACKS and at_s < end_s and at_s + took_s > begin_s
    )
    return Stretch(rank=rank, layer=int(one[4]["layer"]), events=shown, seconds=end_s - begin_s)


def _of(trace: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "M" and event["name"] == kind]


def draw(stretch: Stretch, target: Path) -> None:
    """Writes a PNG. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("matplotlib is not installed; pip install 'poise[report]'") from None
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for track, name, at_s, took_s in stretch.events:
        kind = next((kind for kind in COLOURS if name.startswith(kind)), None)
        if kind is None:
            continue
        label = None if kind in labelled else kind
        labelled.add(kind)
        place = len(TRACKS) - 1 - TRACKS.index(track)
        axes.barh(place, 1e3 * took_s, left=1e3 * at_s, height=0.7, color=COLOURS[kind], label=label)
        if name.startswith(PART):
            axes.text(
                1e3 * (at_s + took_s / 2), place, name.removeprefix("fetch, "), ha="center", va="center", fontsize=7
            )
    axes.set_yticks(range(len(TRACKS)), TRACKS[::-1], fontsize=8)
    axes.set_xlim(0, 1e3 * stretch.seconds)
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"rank {stretch.rank}: replicas for MoE layer {stretch.layer} come", fontsize=9)
    figure.legend(frameon=False, loc="outside right center", fontsize=7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, dpi=DOTS_PER_INCH, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the timeline, draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m poise.report.split_phase", description="Draw a fetch in its parts."
    )
    parser.add_argument("timeline", type=Path, help="what --timeline of `poise generate --expert-parallel` wrote")
    parser.add_argument("target", type=Path, help="the PNG to write")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        draw(stretch_of(json.loads(options.timeline.read_text()), options.rank), options.target)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.timeline} cannot be drawn: {error!r}")
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
