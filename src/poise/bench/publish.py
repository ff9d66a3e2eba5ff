"""How a benchmark in parts ends: its tables or one JSON object on standard output, and a result file where one is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from poise.bench.machine import stamp
from poise.bench.parts import say
from poise.bench.results import document, write_result


def publish(
    name: str,
    results: Mapping[str, Any],
    tables: Callable[[Mapping[str, Any]], Iterable[Table]],
    *,
    output: Path | None,
    json_output: bool,
) -> None:
    """``results["parts"]``: what each part found. One thread per rank or process is what these benchmarks pin."""
    facts = stamp(environment={"OMP_NUM_THREADS": "1"})
    if json_output:
        print(json.dumps(document(name, facts, results)))
    else:
        for table in tables(results["parts"]):
            Console().print(table)
    if output is not None:
        say(f"Wrote {write_result(output, name, facts, results, today=date.today())}")
