"""What the offload benchmarks have in common: the limits, how close a run came to its own, tables, result files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from poise.bench.limits import Limits
from poise.bench.machine import stamp
from poise.bench.offload.case import MEMORY_BYTES, READ_BYTES_PER_S, Outcome, work_directory
from poise.bench.results import document, write_result


@contextmanager
def limited(directory: Path) -> Iterator[Limits]:
    """The reference case's limits; what is not enforced is said."""
    with Limits(memory_bytes=MEMORY_BYTES, read_bytes_per_s=READ_BYTES_PER_S, path=directory) as limits:
        for missing in limits.missing:
            print(f"Not enforced: {missing}", file=sys.stderr)
        yield limits


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def limit_s(outcome: Outcome) -> float:
    """The least time in which what the run did can be done: per pass, the fewest bytes over the disk's rate or its compute.

    Fewest bytes: the experts that the pass used but those that fill all the memory that the plan has for experts, and half
    of the plan's caches where they lie on disk. Compute: what the compute thread took, waiting left out.
    """
    plan = outcome.detail["plan"]
    total = 0.0
    for each in outcome.detail["passes"]:
        used = each["hits"] + each["misses"]
        fewest = max(0, used - plan["expert_slots"]) * plan["expert_bytes"]
        total += max(fewest / READ_BYTES_PER_S, each["computing_s"])
    return total


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a result file has it."""
    return {**asdict(outcome), "tokens_per_s": outcome.tokens_per_s}


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
    facts = stamp()
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


__all__ = ["as_json", "finish", "limit_s", "limited", "say", "work_directory"]
