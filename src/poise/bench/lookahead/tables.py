"""What `poise bench lookahead` prints of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich.table import Table


def tables(parts: Mapping[str, dict[str, Any]]) -> Iterator[Table]:
    """One or more of each part that was run."""
    makers = {
        "choice": _choice,
        "quality": _quality,
        "ceiling": _ceiling,
        "domains": _domains,
        "prefetch": _prefetch,
        "engine": _engine,
    }
    for name, part in parts.items():
        yield from makers.get(name, _engine)(part)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _choice(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [
            str(row["width"]),
            str(row.get("learning_rate", "")),
            str(row.get("tokens", "")),
            str(row.get("epochs", "")),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['recall']:.1%}",
            *(f"{one:.1%}" for one in row["recall_L"]),
        ]
        for row in part["rows"]
    ]
    layers = [f"L{layer}" for layer in range(1, 1 + len(part["rows"][0]["recall_L"]))]
    yield _table(
        "Recall on held-out text by how a lookahead was trained",
        ("width", "rate", "tokens", "epochs", "s", "mean", *layers),
        rows,
    )


def _quality(part: Mapping[str, Any]) -> Iterator[Table]:
    title = f"poise distill, {part['learnt_tokens']} tokens learnt, {part['held_out_tokens']} held out"
    for what, digits in (("recall", 1), ("misplaced_frac", 2), ("left", None)):
        names = list(part["mean"][what])

        def shown(value: float, digits: int | None = digits) -> str:
            return f"{value:.3f}" if digits is None else f"{value:.{digits}%}"

        rows = [[str(row["layer"]), *(shown(row[what][name]) for name in names)] for row in part["layers"]]
        rows.append(["mean", *(shown(part["mean"][what][name]) for name in names)])
        yield _table(f"{title}: {what}", ("layer", *names), rows)


def _ceiling(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = [[str(row["layer"]), row["known"], f"{row['recall']:.1%}"] for row in part["rows"]]
    yield _table(f"Recall by what is known, width {part['width']}", ("layer", "known", "recall"), rows)


def _domains(part: Mapping[str, Any]) -> Iterator[Table]:
    for name, run in part["runs"].items():
        rows = [
            [who, *(" ".join(f"{block:.0%}" for block in (call[0], call[-1])) for call in calls)]
            for who, calls in run["recall"].items()
        ]
        yield _table(
            f"Online, {name}: recall in the first and the last {part['block_passes']} passes of each call; "
            f"learning took {run['time_frac']:.1%} of the time",
            ("lookahead", *part["calls"]),
            rows,
        )


def _prefetch(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [
            str(row["tokens_per_pass"]),
            row["policy"],
            f"{row['used_frac']:.1%}",
            f"{row['hottest_frac']:.1%}",
            f"{row['brier']:.4f}",
        ]
        for row in part["rows"]
    ]
    yield _table(
        f"Experts foreseen, {part['named']} named of each layer",
        ("tokens a pass", "by", "used", "hottest", "squared error"),
        rows,
    )


def _engine(part: Mapping[str, Any]) -> Iterator[Table]:
    """Of ``engine``, and of the disks."""
    disk = ""
    if "read_bytes_per_s" in part:
        disk = f", {part['factor']} times as wide, a disk of {part['read_bytes_per_s'] / 1e9:g} GB/s"
    rows = [
        [
            str(one["sequences"]),
            one["policy"],
            f"{one['misses_per_pass']:.1f}",
            f"{one['reads_per_pass']:.1f}",
            "" if one["ahead_used_frac"] is None else f"{one['ahead_used_frac']:.0%}",
            "" if one["ahead_hottest_frac"] is None else f"{one['ahead_hottest_frac']:.0%}",
            f"{one['cpu_s_per_pass'] * 1e3:.0f}",
            f"{median(one['tokens_per_s']):.1f}",
            f"{fmean(one['tokens_per_s']):.1f}",
        ]
        for one in part["outcomes"]
    ]
    yield _table(
        f"Reading ahead, {part['slots']} experts in memory{disk}; per pass",
        ("rows", "by", "misses", "reads", "used", "hottest", "CPU ms", "tokens/s", "mean"),
        rows,
    )
