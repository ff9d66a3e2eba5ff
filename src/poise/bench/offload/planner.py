"""`poise bench offload-planner`: the planned group, read-ahead and tiers against a sweep of forced ones around them.

Two workloads: many sequences, where the disk and the processor are balanced, and few. A forced plan that runs fewer rows at
once is given as many requests as it runs, as waves are alike. Counted are decode steps, and the whole run with the steps that
were not run as the mean of the others. A plan that would not fit is a remark; memory beside the budget is in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from poise.bench.offload.case import CONFIG, reference_model, work_directory
from poise.bench.offload.contenders import Contenders, decode_passes
from poise.bench.offload.report import SETTING, as_json, bubbles, finish, guesses, limited, memory, shares
from poise.bench.parts import Parts, say
from poise.errors import PoiseError

NAME = "offload-planner"
WORKLOADS: Mapping[str, tuple[int, int, int, int]] = {"many": (256, 16, 32, 3), "few": (16, 32, 32, 10)}
"""Sequences, tokens in and out, decode steps that are run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What the planner chose, of what can be forced."""

    batch_size: int
    num_batches: int
    ahead: int
    slots: int
    kv_on_disk: bool
    streamed: int

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self.batch_size * self.num_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Forced:
    """Another plan: its (batch size, batches), and options of the worker; what is not named is planned."""

    group: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def is_as(self, plan: Planned, sequences: int) -> bool:
        """Whether nothing differs from the plan for so many sequences."""
        group = min(self.group[0], sequences), self.group[1]
        return group == (plan.batch_size, plan.num_batches) and self.options in ({}, {"ahead": plan.ahead})


Variant = Callable[[Planned], Forced]


def _group(plan: Planned) -> tuple[int, int]:
    return plan.batch_size, plan.num_batches


def _fewer(plan: Planned, divisor: int) -> tuple[int, int]:
    """Fewer batches, or where there are not so many, smaller ones."""
    if plan.num_batches >= divisor:
        return plan.batch_size, plan.num_batches // divisor
    return max(1, plan.rows // divisor), 1


def _with_ahead(plan: Planned, *, ahead: int) -> Forced:
    return Forced(group=_group(plan), options={"ahead": min(plan.slots - 1, ahead)})


VARIANTS: Mapping[str, Variant] = {
    "bs-half": lambda plan: Forced(group=(max(1, plan.batch_size // 2), 2 * plan.num_batches)),
    "bs-double": lambda plan: Forced(group=(2 * plan.batch_size, max(1, plan.num_batches // 2))),
    "bs-quadruple": lambda plan: Forced(group=(4 * plan.batch_size, max(1, plan.num_batches // 4))),
    "rows-half": lambda plan: Forced(group=_fewer(plan, 2)),
    "rows-quarter": lambda plan: Forced(group=_fewer(plan, 4)),
    "kv-other": lambda plan: Forced(group=_group(plan), options={"kv_on_disk": not plan.kv_on_disk}),
    "dense-half": lambda plan: Forced(group=_group(plan), options={"dense_layers": CONFIG["num_hidden_layers"] // 2}),
    **{f"ahead-{ahead}": partial(_with_ahead, ahead=ahead) for ahead in (1, 2, 4, 8, 16, 32)},
}
"""Around what was planned."""
PARTS = tuple(f"{workload}-{part}" for workload in WORKLOADS for part in ("planned", "planned-again", *VARIANTS))


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """About 40 minutes; a part of "many" takes up to two and a half, one of "few" one."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with limited(directory) as limits:
        contenders = Contenders(limits=limits, directory=directory)
        done.run({part: partial(_measure, contenders, done, part, steps) for part in PARTS})
        results = done.results()
        summary = {workload: ratios(results, workload) for workload in WORKLOADS}
        tables = [_table(results, workload, summary[workload]) for workload in WORKLOADS if summary[workload]]
        finish(NAME, limits, {"parts": results, "ratios": summary}, tables, output=output, json_output=json_output)
    done.raise_if_failed()


def planned_of(results: Mapping[str, Mapping[str, Any]], workload: str) -> Planned:
    """What part "planned" ran. Raises PoiseError if it has not run yet."""
    found = results.get(f"{workload}-planned")
    if found is None:
        raise PoiseError(f"what to vary is not known; run --part {workload}-planned first")
    plan = found["plan"]
    return Planned(
        batch_size=plan["batch_size"],
        num_batches=plan["num_batches"],
        ahead=plan["prefetch_experts"],
        slots=plan["expert_slots"],
        kv_on_disk=plan["kv_on_disk"],
        streamed=plan["dense_layers_streamed"],
    )


def _measure(contenders: Contenders, done: Parts, part: str, steps: int | None) -> dict[str, Any]:
    workload, _, name = part.partition("-")
    sequences, prompt_tokens, new_tokens, own_steps = WORKLOADS[workload]
    options: dict[str, Any] = {}
    if name in VARIANTS:
        plan = planned_of(done.results(), workload)
        forced = VARIANTS[name](plan)
        if forced.is_as(plan, sequences):
            return {"name": name, "forced": {}, "remark": "as planned"}
        sequences = min(sequences, forced.group[0] * forced.group[1])
        options = {"groups": [list(forced.group)], **forced.options}
    try:
        outcome = contenders.poise(
            sequences=sequences, prompt_tokens=prompt_tokens, new_tokens=new_tokens, steps=steps or own_steps, **options
        )
    except PoiseError as error:
        if "BudgetError" not in str(error):
            raise
        say(f"  {name}: does not fit")
        return {"name": name, "forced": options, "remark": "does not fit"}
    decode = shares(decode_passes(outcome.detail["passes"]))
    rates = {"decode_tokens_per_s": decode["tokens"] / decode["pass_s"], "tokens_per_s": outcome.tokens_per_s}
    say(f"  {name}: {rates['decode_tokens_per_s']:.2f} tokens/s in decode, {rates['tokens_per_s']:.2f} in all")
    facts = as_json(outcome)
    ran = facts.pop("detail")["plan"]
    return {"name": name, "forced": options, "plan": ran, "poise": facts, "decode": decode, **rates}


def ratios(results: Mapping[str, Mapping[str, Any]], workload: str) -> dict[str, float]:
    """Planned (the mean of its runs) over the best of all, in decode and in all; how far the planned runs lie apart."""
    ran = {part: each for part, each in results.items() if part.startswith(f"{workload}-") and "plan" in each}
    planned = [each for part, each in ran.items() if part.startswith(f"{workload}-planned")]
    if not planned:
        return {}
    found: dict[str, float] = {}
    for rate in ("decode_tokens_per_s", "tokens_per_s"):
        mean = fmean(each[rate] for each in planned)
        forced = [each[rate] for each in ran.values() if each not in planned]
        found[rate] = mean / max([mean, *forced])
    rates = [each["tokens_per_s"] for each in planned]
    found["spread_of_planned_runs"] = max(rates) / min(rates) - 1.0
    return found


def _table(results: Mapping[str, Mapping[str, Any]], workload: str, found: Mapping[str, float]) -> Table:
    sequences, prompt_tokens, new_tokens, _ = WORKLOADS[workload]
    ratio = f"; planned/best {found['tokens_per_s']:.3f}" if found else ""
    table = Table("", title=f"{sequences} sequences, {prompt_tokens} in, {new_tokens} out; {SETTING}{ratio}")
    for column in ("bs x n", "K", "slots", "KV on disk", "dense streamed", "decode tokens/s", "tokens/s", "predicted"):
        table.add_column(column, justify="right")
    table.add_column("peak/limit, added/budget GB", justify="right")
    table.add_column("read ahead: used, hottest")
    table.add_column("bubbles a pass")
    for part, result in results.items():
        if not part.startswith(f"{workload}-"):
            continue
        if "plan" not in result:
            table.add_row(result["name"], result["remark"])
            continue
        plan = result["plan"]
        table.add_row(
            result["name"],
            f"{plan['batch_size']} x {plan['num_batches']}",
            str(result["forced"].get("ahead", plan["prefetch_experts"])),
            str(plan["expert_slots"]),
            "yes" if plan["kv_on_disk"] else "no",
            str(plan["dense_layers_streamed"]),
            f"{result['decode_tokens_per_s']:.2f}",
            f"{result['tokens_per_s']:.2f}",
            f"{plan['predicted_tokens_per_s']:.2f}",
            memory(result["poise"]),
            guesses(result["poise"]),
            bubbles(result["decode"]),
        )
    return table
