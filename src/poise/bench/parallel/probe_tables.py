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
    "slowest",
    "predicting",
    "aside",
)


def tables(parts: Mapping[str, Facts]) -> list[Table]:
    """In the order of the parts."""
    made = []
    for name, facts in parts.items():
        for row in facts.get("rows", [facts]):
            made += [_learnt(name, row)] if "block_passes" in row else [_speeds(name, row), _balanced(row)]
    return made


def _speeds(name: str, facts: Facts) -> Table:
    title = f"{name}: {facts['pass']}, {facts['tokens_per_rank']} tokens a rank, {facts['layout']}; {facts['model']}"
    if facts.get("layer_periods") is not None:
        title += f"; {facts['layer_periods']:.0f} periods of the quotas in a layer"
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
            _percent(told.get("exposed_most_frac")),
            _percent(told.get("predicting_of_experts_flops")),
            f"{1e3 * told['aux_s_per_pass']:.0f} ms",
        )
    table.caption = (
        "replicas, MB, layers where none paid and processor time aside: of a pass; exposed: mean of the ranks, slowest: of the "
        "slowest rank of each layer; predicting: of the experts' FLOPs"
    )
    return table


def _percent(value: float | None) -> str:
    """Nothing for a result of before it was measured."""
    return "" if value is None else f"{value:.2%}"


def _learnt(name: str, facts: Facts) -> Table:
    """What predictors guess wrong, block by block of passes, and what learning took."""
    blocks = len(next(iter(facts["policies"].values()))["guessed_wrong_frac"])
    begins = [facts["block_passes"] * block - facts["passes_before"] for block in range(blocks)]
    title = f"{name}: guessed wrong, by passes from the switch to code on; {facts['layout']}; {facts['model']}"
    table = _empty(title, (*(f"{begin:+d}" for begin in begins), "tokens max/mean", "step", "steps learnt", "of time"))
    for policy, row in facts["policies"].items():
        table.add_row(
            policy,
            *(f"{wrong:.1%}" for wrong in row["guessed_wrong_frac"]),
            f"{row['imbalance'][-1]:.2f}",
            f"{1e3 * row['step_s'][-1]:.0f} ms",
            f"{row['learnt_steps']:.0f}",
            f"{row['learnt_frac']:.1%}",
        )
    table.caption = "tokens max/mean and step: of the last block; steps: of all ranks"
    return table


def _empty(title: str | None, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    table.add_column("policy")
    for column in columns:
        table.add_column(column, justify="right")
    return table
