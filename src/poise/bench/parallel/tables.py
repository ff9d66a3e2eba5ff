"""The tables of `poise bench parallel`, one for each part that has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

Facts = Mapping[str, Any]


def tables(parts: Mapping[str, Facts]) -> list[Table]:
    """In the order of the parts."""
    return [MAKERS[name.partition("-")[0]](facts) for name, facts in parts.items()]


def _exact(facts: Facts) -> Table:
    table = _table(
        "greedy tokens against one process, fp32",
        "model",
        "ranks",
        "policy",
        "tokens",
        "different",
        "moves",
        "replicas",
    )
    for row in facts["rows"]:
        table.add_row(
            *(str(row[name]) for name in ("model", "ranks", "policy", "tokens", "different", "moves")),
            str(row.get("replicas", "")),
        )
    return table


def _unequal(facts: Facts) -> Table:
    shares = " / ".join(f"{share:g}" for share in facts["shares"])
    title = f"{facts['model']}: ranks with {shares} of a core, {facts['tokens_per_rank']} tokens each, {facts['passes']} passes"
    table = _table(title, "placement", "step", "quartiles", "experts", "of bound", "time max/mean", "tokens max/mean")
    for name, row in facts["policies"].items():
        table.add_row(
            name,
            _ms(row["step_s"]),
            _range(row["step_s_quartiles"]),
            _ms(row["expert_s"]),
            f"{row['bound_frac']:.0%}",
            f"{row['time_imbalance']:.2f}",
            f"{row['token_imbalance']:.2f}",
        )
    table.caption = f"no placement takes less than {_ms(facts['bound_s'])} for experts, by the times that were measured"
    return table


def _change(facts: Facts) -> Table:
    names = ("before", "right after", "at the end", "first move", "recovered", "moves before", "after", "total after")
    table = _table(f"{facts['change']}; {facts['model']}", "policy", *names)
    for name, row in facts["policies"].items():
        table.add_row(
            name,
            *(_ms(row[key]) for key in ("before_s", "worst_s", "end_s")),
            _after(row, "detected"),
            _after(row, "recovered"),
            str(row["moves_before"]),
            str(row["moves_after"]),
            f"{row['total_after_s']:.1f} s",
        )
    return table


def _watching(facts: Facts) -> Table:
    title = f"what watching costs: decode of {facts['sequences']} sequences, {facts['model']}, {facts['passes']} passes"
    table = _table(title, "taken down", "step", "rounds from", "to", "over nothing", "first round")
    for name, row in facts["ways"].items():
        least, most = min(row["step_s_by_round"]), max(row["step_s_by_round"])
        seconds = map(_ms, (row["step_s"], least, most))
        table.add_row(name, *seconds, f"{row['over_nothing'] - 1:+.1%}", _ms(row["first_round_s"]))
    return table


def _scaling(facts: Facts) -> Table:
    table = _table(
        "strong scaling",
        "model",
        "pass",
        "ranks",
        "step",
        "quartiles",
        "speed-up",
        "waiting",
        "exchange",
        "tokens max/mean",
    )
    for row in sorted(facts["rows"], key=lambda row: (row["model"], row["pass"])):
        table.add_row(
            row["model"],
            row["pass"],
            row["layout"],
            _ms(row["step_s"]),
            _range(row["step_s_quartiles"]),
            f"{row['speedup']:.2f}x",
            " ".join(f"{share:.0%}" for share in row["waited_frac"]),
            " ".join(f"{share:.0%}" for share in row["exchange_frac"]),
            f"{row['token_imbalance']:.2f}",
        )
    return table


def _halves(facts: Facts) -> Table:
    title = f"passes of one batch, and of two that take turns; {facts['model']}"
    table = _table(title, "links", "pass", "one batch", "two in lockstep", "in halves", "quartiles", "faster", "ran so")
    for row in facts["rows"]:
        table.add_row(
            row["layout"],
            row["pass"],
            _ms(row["whole"]["step_s"]),
            _ms(row["lockstep"]["step_s"]),
            _ms(row["halves"]["step_s"]),
            _range(row["halves"]["step_s_quartiles"]),
            f"{row['whole']['step_s'] / row['halves']['step_s']:.2f}x",
            str(row["passes_in_halves"] or "none"),
        )
    return table


MAKERS: Mapping[str, Callable[[Facts], Table]] = {
    "exact": _exact,
    "unequal": _unequal,
    "cut": _change,
    "switch": _change,
    "watching": _watching,
    "scaling": _scaling,
    "halves": _halves,
}
"""By the begin of a part's name."""


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def _range(quartiles: Sequence[float]) -> str:
    return "-".join(f"{1e3 * value:.0f}" for value in quartiles)


def _after(row: Facts, what: str) -> str:
    passes, seconds = row[f"{what}_after_passes"], row[f"{what}_after_s"]
    return "never" if passes is None else f"{passes} passes, {seconds:.1f} s"
