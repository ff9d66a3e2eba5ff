"""Step time over passes, through a change in the middle, from a result file of `poise bench parallel`.

    python -m poise.bench.parallel.plot benchmarks/results/DATE-parallel.json docs/recovery.png

Needs matplotlib (``poise[report]``). The picture shows nothing that is not in the file, whose name and commits it bears.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import UsageError

FORMAT = "parallel"
PARTS = ("cut", "switch")
SMOOTH = 3
SIZE_INCHES, DOTS_PER_INCH = (7.2, 5.6), 160
COLOURS = {"vibe": "tab:blue", "eplb": "tab:orange"}
NAMES = {"vibe": "ViBE", "eplb": "EPLB"}


def smoothed(values: Sequence[float]) -> list[float]:
    """Running median over ``SMOOTH`` passes, of fewer at the ends."""
    half = SMOOTH // 2
    return [float(np.median(values[max(0, place - half) : place + half + 1])) for place in range(len(values))]


def draw(parts: Mapping[str, Any], target: Path, *, source: str) -> None:
    """Writes a PNG: a diagram for each part, the change as a line, moves as ticks. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("matplotlib is not installed; pip install 'poise[report]'") from None
    shown = [name for name in PARTS if name in parts]
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown, strict=True):
        facts = parts[name]
        for policy, row in facts["policies"].items():
            times_ms = [1e3 * value for value in smoothed(row["step_s"])]
            axes.plot(times_ms, color=COLOURS[policy], linewidth=1.6, label=NAMES[policy])
            for at, moved in row["rearrangements"]:
                if at < len(times_ms) and moved:
                    axes.plot([at], [times_ms[at]], color=COLOURS[policy], marker="v", markersize=6)
            axes.axvline(row["change_at_pass"], color="0.6", linewidth=0.8, linestyle="--")
        axes.set_title(f"{facts['change']}; triangles: experts begin to move", fontsize=9)
        axes.set_ylabel("step, ms")
        axes.set_ylim(bottom=0)
        axes.grid(True, color="0.92")
        axes.legend(frameon=False, loc="lower right")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_xlabel("pass")
    figure.text(0.995, 0.003, source, ha="right", va="bottom", fontsize=6, color="0.5")
    figure.savefig(target, dpi=DOTS_PER_INCH, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the result file, draws the picture."""
    parser = argparse.ArgumentParser(prog="python -m poise.bench.parallel.plot", description="Draw recovery.")
    parser.add_argument("result", type=Path, help="a result file of `poise bench parallel`")
    parser.add_argument("target", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.result.read_text())
        if document["name"] != FORMAT:
            parser.error(f"{options.result} is a result of {document['name']!r}; give one of {FORMAT!r}")
        parts = document["results"]["parts"]
        if not any(name in parts for name in PARTS):
            parser.error(f"{options.result} has none of the parts {', '.join(PARTS)}; run them")
        commits = sorted({(parts[name]["commit"] or "?")[:7] for name in PARTS if name in parts})
        draw(parts, options.target, source=f"{options.result.name}, {', '.join(commits)}")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.result} cannot be drawn: {error!r}")
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
