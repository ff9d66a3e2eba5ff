"""What `poise demo` found, and how it is printed: the texts, the table, and what the figures mean. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from poise.units import format_bytes, format_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One program's run. ``read_bytes`` is what it read from storage while generating; None where it is not counted.

    ``start_s`` is the life of the process less the time it generated: imports, loading, and for Accelerate writing its
    offload folder. ``peak_bytes`` is the control group's where the kernel limits memory, else the largest resident set.
    """

    start_s: float
    generate_s: float
    generated_tokens: int
    read_bytes: int | None
    peak_bytes: int
    texts: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over prefill and decode."""
        return self.generated_tokens / self.generate_s


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """The whole demo. ``accelerate`` is None when the baseline has no figures; ``remark`` then says why.

    ``limit_bytes`` is what the kernel allowed each process: ``base_bytes``, its resident set after the imports, and
    ``budget_bytes``. ``disk_bytes_per_s`` is what the disk delivered to an independent reader just before.
    """

    prompts: tuple[str, ...]
    max_tokens: int
    factor: int
    weights_bytes: int
    base_bytes: int
    budget_bytes: int
    disk_bytes_per_s: float
    poise: Contender
    accelerate: Contender | None
    remark: str | None
    plan: Mapping[str, Any]
    limits_enforced: tuple[str, ...]
    limits_missing: tuple[str, ...]

    @property
    def limit_bytes(self) -> int:
        return self.base_bytes + self.budget_bytes

    @property
    def speedup(self) -> float | None:
        """Poise's tokens per second over Accelerate's."""
        return self.poise.tokens_per_s / self.accelerate.tokens_per_s if self.accelerate else None

    @property
    def disk_frac(self) -> float | None:
        """The share of Poise's time that reading its bytes at the disk's full rate would take alone (0-1)."""
        if self.poise.read_bytes is None:
            return None
        return self.poise.read_bytes / self.disk_bytes_per_s / self.poise.generate_s

    @property
    def same_texts(self) -> int:
        """For how many prompts both wrote the same, as far as the shorter text goes."""
        if self.accelerate is None:
            return 0
        pairs = zip(self.poise.texts, self.accelerate.texts, strict=True)
        return sum(ours.startswith(theirs) or theirs.startswith(ours) for ours, theirs in pairs)


def print_report(report: DemoReport, console: Console) -> None:
    """The report for a person."""
    for prompt, text in zip(report.prompts, report.poise.texts, strict=True):
        console.rule(style="dim")
        console.print(Text(prompt, style="dim") + Text(text))
    console.rule(style="dim")
    console.print(_table(report))
    for line in _remarks(report):
        console.print(f"- {line}", highlight=False, markup=False)


def _table(report: DemoReport) -> Table:
    rows: list[tuple[str, Callable[[Contender], str]]] = [
        ("start and load", lambda run: format_s(run.start_s)),
        ("generated tokens", lambda run: str(run.generated_tokens)),
        ("tokens/s, prefill included", lambda run: f"{run.tokens_per_s:.3g}"),
        ("read from disk", lambda run: "unknown" if run.read_bytes is None else f"{run.read_bytes / 1e9:.2f} GB"),
        ("peak memory", lambda run: format_bytes(run.peak_bytes)),
    ]
    table = Table("", title="The same prompts under the same memory limit")
    table.add_column("Poise", justify="right")
    table.add_column("Accelerate", justify="right")
    for label, figure in rows:
        table.add_row(label, figure(report.poise), figure(report.accelerate) if report.accelerate else "-")
    return table


def _remarks(report: DemoReport) -> list[str]:
    weights, budget = format_bytes(report.weights_bytes), format_bytes(report.budget_bytes)
    remarks = [
        f"The model: the bundled one with experts widened {report.factor} times to {weights} of weights; "
        "it computes the same function with the same routing.",
        f"The memory: a budget of {budget} for weights, caches and buffers, {_share(report)} of the weights, beside "
        f"{format_bytes(report.base_bytes)} that the process takes after its imports.",
        _plan_line(report.plan),
    ]
    if report.speedup is not None:
        same = f"{report.same_texts} of {len(report.prompts)} texts agree"
        remarks.append(f"Poise generates {report.speedup:.3g} times as many tokens a second as Accelerate; {same}.")
    if report.remark is not None:
        remarks.append(report.remark)
    if report.disk_frac is not None:
        reading_s = report.disk_frac * report.poise.generate_s
        remarks.append(
            f"The disk delivers {report.disk_bytes_per_s / 1e9:.2f} GB/s. Reading what Poise read takes it "
            f"{format_s(reading_s)} of the {format_s(report.poise.generate_s)} that Poise took: {report.disk_frac:.0%}."
        )
    remarks += [f"Enforced by the kernel: {limit}." for limit in report.limits_enforced]
    remarks += [
        f"NOT enforced: {limit}. The page cache holds the weights for Accelerate then, which flatters it."
        for limit in report.limits_missing
    ]
    return remarks


def _share(report: DemoReport) -> str:
    return f"{report.budget_bytes / report.weights_bytes:.0%}"


def _plan_line(plan: Mapping[str, Any]) -> str:
    """The plan as ``LLM.describe`` gives it."""
    reads = "direct reads" if plan["direct_io"] else "reads through the page cache"
    batches = "1 batch" if plan["num_batches"] == 1 else f"{plan['num_batches']} batches"
    return (
        f"The plan: {plan['expert_slots']} of {plan['experts']} experts in memory at a time, "
        f"{format_bytes(plan['expert_bytes'])} each, {reads}; {batches} of up to "
        f"{plan['batch_size']} sequences in lockstep, prompts in chunks of {plan['chunk_tokens']} tokens."
    )
