"""What the offload benchmarks have in common: the limits, the columns of their tables, their result files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from poise.bench.limits import Limits
from poise.bench.machine import stamp
from poise.bench.offload.case import MEMORY_BYTES, READ_BYTES_PER_S, Outcome
from poise.bench.results import document, write_result

SETTING = "2.5 GB of memory, 1 GB/s of disk, 10 GB of model"


@contextmanager
def limited(directory: Path) -> Iterator[Limits]:
    """The reference case's limits; what is not enforced is said."""
    with Limits(memory_bytes=MEMORY_BYTES, read_bytes_per_s=READ_BYTES_PER_S, path=directory) as limits:
        for missing in limits.missing:
            print(f"Not enforced: {missing}", file=sys.stderr)
        yield limits


def line(outcome: Outcome | str) -> str:
    """An outcome for the progress."""
    if isinstance(outcome, str):
        return f"  {outcome}"
    step = f", {outcome.step_s:.2f} s a decode step" if outcome.step_s is not None else ""
    return f"  {outcome.name}: {outcome.tokens_per_s:.2f} tokens/s, prefill {outcome.prefill_s or 0:.1f} s{step}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a result file has it, Poise's with its limit, its bubbles and its memory beside the budget."""
    facts = {**asdict(outcome), "tokens_per_s": outcome.tokens_per_s, "memory_bytes": MEMORY_BYTES}
    if outcome.name == "Poise":
        plan = outcome.detail["plan"]
        facts["added_bytes"] = outcome.detail["peak_rss_bytes"] - plan["base_bytes"]
        facts["budget_bytes"] = plan["budget_bytes"]
        facts |= {phase: outcome.detail[phase] for phase in ("prefill_ahead", "decode_ahead")}
        facts |= shares(outcome.detail["passes"])
        limit_s = sum(each["limit"]["seconds"] for each in outcome.detail["passes"] if "limit" in each)
        if limit_s:
            elapsed_s = sum(each["seconds"] for each in outcome.detail["passes"])
            facts["limit_frac"] = limit_s / elapsed_s
            facts["limit_tokens_per_s"] = outcome.tokens_per_s * elapsed_s / limit_s
    return facts


def shares(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the time of passes went, in seconds a pass: computing, disk busy, and every bubble by its name; and their limit."""
    count = len(passes)
    assert count, "there is no pass to say something of"
    names = sorted({name for each in passes for name in each["bubbles_s"]})
    facts: dict[str, Any] = {
        "passes_counted": count,
        "tokens": sum(each["tokens"] for each in passes) / count,
        "pass_s": sum(each["seconds"] for each in passes) / count,
        "computing_s": sum(each["computing_s"] for each in passes) / count,
        "disk_busy_s": sum(each["disk_busy_s"] for each in passes) / count,
        "bubbles_s": {name: sum(each["bubbles_s"].get(name, 0.0) for each in passes) / count for name in names},
    }
    if all("limit" in each for each in passes):
        for key in ("seconds", "disk_s", "compute_s", "fewest_bytes"):
            facts[f"limit_{key}"] = sum(each["limit"][key] for each in passes) / count
    return facts


def bubbles(facts: Mapping[str, Any], least_frac: float = 0.01) -> str:
    """The bubbles that take a hundredth of the pass or more, longest first."""
    named = sorted(facts.get("bubbles_s", {}).items(), key=lambda item: -item[1])
    return "\n".join(f"{seconds:.2f} s {name}" for name, seconds in named if seconds >= least_frac * facts["pass_s"])


def guesses(facts: Mapping[str, Any]) -> str:
    """Of what was read ahead, in prefill and in decode: the share that was used, and that was among the hottest to read."""
    lines = []
    for phase in ("prefill", "decode"):
        ahead = facts.get(f"{phase}_ahead", {})
        if ahead.get("named"):
            lines.append(f"{phase} {ahead['used_frac']:.0%}, {ahead['hottest_frac']:.0%}")
    return "\n".join(lines)


def memory(facts: Mapping[str, Any]) -> str:
    """Peak of the memory group over the limit; of Poise also what it added over its budget. In GB."""
    peak = f"{facts['peak_bytes'] / 1e9:.2f}" if facts["peak_bytes"] is not None else "?"
    text = f"{peak}/{facts['memory_bytes'] / 1e9:.2f}"
    return (
        text + f", {facts['added_bytes'] / 1e9:.2f}/{facts['budget_bytes'] / 1e9:.2f}"
        if "added_bytes" in facts
        else text
    )


def extrapolated(facts: Mapping[str, Any]) -> str:
    """How many of the decode steps were run."""
    steps = facts["new_tokens"] - 1
    return f"{steps - facts['extrapolated_steps']} of {steps}"


def finish(
    name: str,
    limits: Limits,
    results: dict[str, Any],
    tables: Sequence[Table],
    *,
    output: Path | None,
    json_output: bool,
) -> None:
    """Prints and writes what was measured."""
    facts = stamp(limits_enforced=limits.enforced, limits_missing=limits.missing)
    results = {
        "limits_enforced": list(limits.enforced),
        "limits_missing": list(limits.missing),
        "memory_bytes": MEMORY_BYTES,
        "read_bytes_per_s": READ_BYTES_PER_S,
        **results,
    }
    if json_output:
        print(json.dumps(document(name, facts, results)))
    else:
        for table in tables:
            Console().print(table)
    if output is not None:
        path = write_result(output, name, facts, results, today=date.today())
        print(f"Wrote {path}", file=sys.stderr)
