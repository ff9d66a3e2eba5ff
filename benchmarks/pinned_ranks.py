"""Policies side by side on a machine with many cores, without root: `PYTHONPATH=src:. python3 -m benchmarks.pinned_ranks`.

Parts, and what is measured: ``poise.bench.parallel.pinned``. One that breaks, or for which there are too few cores, is in the
result with its error, and the others go on; when time is up, what was measured by then is told.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from poise.bench.machine import stamp
from poise.bench.parallel.case import Case, widened_case, work_directory
from poise.bench.parallel.pinned import PARTS, Part, measure
from poise.bench.parallel.probe_tables import tables
from poise.bench.parts import say
from poise.bench.results import document, write_result
from poise.bench.scratch import Scratch
from poise.errors import PoiseError

NAME = "parallel-pinned"


def main() -> None:
    asked = _arguments()
    until_s = time.monotonic() + asked.seconds
    try:
        wanted = {name: Part.named(name) for name in asked.part or PARTS}
        case = widened_case(work_directory())
    except PoiseError as error:
        sys.exit(str(error))
    found = {name: _part(name, part, case, asked, until_s) for name, part in wanted.items()}
    measured = {name: facts for name, facts in found.items() if "error" not in facts}
    facts = stamp(environment={"OMP_NUM_THREADS": "1"})
    if facts.commit is None:
        facts = replace(facts, commit=asked.commit)
    results = {"rounds": asked.rounds, "steps": asked.steps, "parts": found}
    if asked.json:
        print(json.dumps(document(NAME, facts, results)))
    else:
        for table in tables(measured):
            Console(width=160).print(table)
    if asked.output is not None:
        say(f"Wrote {write_result(asked.output, NAME, facts, results, today=date.today())}")
    if len(measured) < len(found):
        sys.exit(f"{len(found) - len(measured)} of {len(found)} parts failed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", help=f"that alone is run, may be repeated; all: {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=8, help="passes that count, of each contender in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=900.0, help="after which nothing more begins")
    parser.add_argument("--output", type=Path, help="directory of the result file")
    parser.add_argument("--commit", help="that is measured, where this is no checkout")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output in place of tables")
    asked = parser.parse_args()
    for name in ("steps", "rounds", "seconds"):
        if getattr(asked, name) <= 0:
            parser.error(f"--{name} is {getattr(asked, name):g}; give a positive number")
    return asked


def _part(name: str, part: Part, case: Case, asked: argparse.Namespace, until_s: float) -> dict[str, Any]:
    say(f"Part {name}")
    try:
        with Scratch() as scratch:
            return measure(part, case, scratch.path, steps=asked.steps, rounds=asked.rounds, until_s=until_s)
    except PoiseError as error:
        say(f"  failed: {error}")
        return {"error": str(error)}


if __name__ == "__main__":
    main()
