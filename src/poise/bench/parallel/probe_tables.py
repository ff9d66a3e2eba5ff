"""The tables of `poise bench parallel --suite probe`, one for each part that has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Facts = Mapping[str, Any]
SPEED = ("step", "quartiles", "faster", "of even", "experts", "tokens max/mean", "moves")
BALANCED = (
    "at home",
    "guessed wrong",
    "replicas used",
    "late",
    "MB",
    "declined",
    "exposed",
    "aside",
)


def tables(parts: Mapping[str, Facts]) -> list[Table]:
    """In the order of the parts."""
    made = []
    for name, facts in parts.items():
        for row in facts.get("rows", [facts]):
            made += [_speeds(name, row), _balanced(row)]
    return made


def _speeds(name: str, facts: Facts) -> Table:
    title = f"{name}: {facts['pass']}, {facts['tokens_per_rank']} tokens a rank, {facts['layout']}; {facts['model']}"
    table = _empty(title, SPEED)
    for policy, row in facts["policies"].items():
        low, high = row["step_s_quartiles"]
        table.add_row(
            policy,
            f"{1e3 * row['step_s']:.0f} ms",
            f"{1e3 * low:.0f}-{1e3 * high:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['of_even']:.0%}",
            f"{1e3 * row['expert_s']:.0f} ms",
            f"{row['token_imbalance']:.2f}",
            f"{row['moves']}",
        )
    table.caption = "of even: the step, were the first one's experts as long on all ranks, over the step"
    return table


def _balanced(facts: Facts) -> Table:
    """What balancing each step did there."""
    table = _empty(None, BALANCED)
    for policy, row in facts["policies"].items():
        if (told := row["balanced"]) is None:
            continue
        used = told["replicas_used_per_pass"]
        table.add_row(
            policy,
            f"{told['home_imbalance']:.2f}",
            f"{told['guessed_wrong_frac']:.0%}",
            f"{used:.1f}",
            f"{told['replicas_planned_per_pass'] - used:.1f}",
            f"{told['replica_bytes_per_pass'] / 1e6:.1f}",
            f"{told['declined_per_pass']:.1f}",
            f"{told['exposed_frac']:.1%}",
            f"{1e3 * told['aux_s_per_pass']:.0f} ms",
        )
    table.caption = "replicas, MB, layers where none paid and processor time aside: of a pass"
    return table


def _empty(title: str | None, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    table.add_column("policy")
    for column in columns:
        table.add_column(column, justify="right")
    return table
