"""The tables of `poise bench parallel --suite probe`, one for each part that has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Facts = Mapping[str, Any]
COLUMNS = (
    "step",
    "quartiles",
    "faster",
    "of even",
    "experts",
    "tokens max/mean",
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
        made += [_table(name, row) for row in facts["rows"]] if "rows" in facts else [_table(name, facts)]
    return made


def _table(name: str, facts: Facts) -> Table:
    title = f"{name}: {facts['pass']}, {facts['tokens_per_rank']} tokens a rank, {facts['layout']}; {facts['model']}"
    table = Table(title=title)
    table.add_column("policy")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for policy, row in facts["policies"].items():
        low, high = row["step_s_quartiles"]
        table.add_row(
            policy,
            f"{1e3 * row['step_s']:.3g} ms",
            f"{1e3 * low:.0f}-{1e3 * high:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['of_even']:.0%}",
            f"{1e3 * row['expert_s']:.3g} ms",
            f"{row['token_imbalance']:.2f}",
            *_balanced(row["balanced"]),
        )
    table.caption = (
        "of even: the step, were the yardstick's experts as long on all ranks, over the step; replicas, MB, layers where none "
        "paid and processor time aside: of a pass"
    )
    return table


def _balanced(row: Facts | None) -> list[str]:
    if row is None:
        return [""] * (len(COLUMNS) - 6)
    used = row["replicas_used_per_pass"]
    return [
        f"{row['home_imbalance']:.2f}",
        f"{row['guessed_wrong_frac']:.0%}",
        f"{used:.1f}",
        f"{row['replicas_planned_per_pass'] - used:.1f}",
        f"{row['replica_bytes_per_pass'] / 1e6:.1f}",
        f"{row['declined_per_pass']:.1f}",
        f"{row['exposed_frac']:.1%}",
        f"{1e3 * row['aux_s_per_pass']:.1f} ms",
    ]
