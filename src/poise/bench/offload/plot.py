"""Throughput over the number of sequences with the limit drawn in, from a result file of `poise bench offload-alike`.

    python -m poise.bench.offload.plot benchmarks/results/DATE-offload-alike.json docs/throughput.png

Needs matplotlib (``poise[report]``). The picture shows nothing that is not in the file, whose name and commit it bears.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import UsageError

FORMAT = "offload-alike"
SIZE_INCHES, DOTS_PER_INCH = (7.0, 4.4), 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Decode tokens per second by the number of sequences, ascending."""

    name: str
    sequences: tuple[int, ...]
    tokens_per_s: tuple[float, ...]


def read_series(results: Mapping[str, Any]) -> list[Series]:
    """The limit, Poise and Accelerate, of the parts that a result file holds."""
    parts = sorted(results["parts"].values(), key=lambda part: part["sequences"])
    decode = [(part["sequences"], part["decode"]) for part in parts]
    theirs = [(part["sequences"], part["accelerate"]) for part in parts if "accelerate" in part]
    return [
        _series(
            "limit of disk and products", [(count, each["tokens"] / each["limit_seconds"]) for count, each in decode]
        ),
        _series("Poise", [(count, each["tokens"] / each["pass_s"]) for count, each in decode]),
        _series("transformers + Accelerate", [(count, count / each["step_s"]) for count, each in theirs]),
    ]


def _series(name: str, points: Sequence[tuple[int, float]]) -> Series:
    return Series(
        name=name, sequences=tuple(count for count, _ in points), tokens_per_s=tuple(rate for _, rate in points)
    )


def draw(series: Sequence[Series], target: Path, *, title: str, source: str) -> None:
    """Writes a PNG, both axes logarithmic; the first series is the limit, dashed. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, NullLocator
    except ModuleNotFoundError:
        raise UsageError("matplotlib is not installed; pip install 'poise[report]'") from None
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    limit, *measured = series
    axes.plot(limit.sequences, limit.tokens_per_s, color="0.45", linestyle="--", linewidth=1.5, label=limit.name)
    for each, colour, marker in zip(measured, ("tab:blue", "tab:orange"), ("o", "s"), strict=True):
        axes.plot(each.sequences, each.tokens_per_s, color=colour, marker=marker, linewidth=2.0, label=each.name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(limit.sequences)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("sequences at once")
    axes.set_ylabel("decode, tokens per second")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", color="0.9")
    axes.legend(frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.text(0.995, 0.005, source, ha="right", va="bottom", fontsize=6, color="0.5")
    figure.savefig(target, dpi=DOTS_PER_INCH, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the result file, draws the picture."""
    parser = argparse.ArgumentParser(prog="python -m poise.bench.offload.plot", description="Draw throughput.")
    parser.add_argument("result", type=Path, help="a result file of `poise bench offload-alike`")
    parser.add_argument("target", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.result.read_text())
        if document["name"] != FORMAT:
            parser.error(f"{options.result} is a result of {document['name']!r}; give one of {FORMAT!r}")
        series = read_series(document["results"])
        facts = document["stamp"]
        memory = f"{document['results']['memory_bytes'] / 1e9:.1f} GB of memory"
        title = f"10 GB model, {memory}, 1 GB/s disk, {facts['cores']} cores"
        draw(series, options.target, title=title, source=f"{options.result.name}, {(facts['commit'] or '?')[:7]}")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.result} cannot be drawn: {error!r}")
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
