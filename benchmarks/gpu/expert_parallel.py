"""What expert parallelism and `--balance probe` cost on one GPU: `PYTHONPATH=src:. python3 -m benchmarks.gpu.expert_parallel`.

One GPU shows what its own experts, copies and launches take; nothing here is of several GPUs or their links. A part that
breaks is in the result with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu.expert_curves import expert_curves
from benchmarks.gpu.grouped_experts import grouped_experts
from benchmarks.gpu.hiding import hiding, pcie_bytes_per_s
from benchmarks.gpu.step_costs import lookahead_costs, round_trip
from benchmarks.gpu.transport import transport
from poise.bench.machine import stamp
from poise.bench.results import document, write_result

NAME = "gpu-expert-parallel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="directory of the result file")
    parser.add_argument("--commit", help="that is measured, where this is no checkout")
    parser.add_argument("--part", action="append", help="that alone is run, into a file of its name; may be repeated")
    parser.add_argument("--cap-s", type=float, default=12.0, help="for the curve of each shape")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU that torch can use")
    parts: dict[str, Callable[[], object]] = {
        "pcie_bytes_per_s": pcie_bytes_per_s,
        "hiding": hiding,
        "transport": transport,
        "round_trip": round_trip,
        "lookahead": lookahead_costs,
        "grouped_experts": grouped_experts,
        "expert_curves": lambda: expert_curves(asked.cap_s),
    }
    if unknown := set(asked.part or ()) - set(parts):
        sys.exit(f"part {min(unknown)!r} is not known; choose among {', '.join(parts)}")
    results: dict[str, object] = {}
    with torch.inference_mode():
        for name in asked.part or parts:
            results[name] = _run(name, parts[name])
    facts = stamp()
    if facts.commit is None:
        facts = replace(facts, commit=asked.commit)
    name = "-".join([NAME, *(part.replace("_", "-") for part in asked.part or ())])
    print(json.dumps(document(name, facts, results), indent=1))
    if asked.output is not None:
        print(f"wrote {write_result(asked.output, name, facts, results, today=date.today())}", file=sys.stderr)


def _run(name: str, part: Callable[[], object]) -> object:
    began_s = time.perf_counter()
    try:
        return part()
    except Exception:  # noqa: BLE001 - the others are worth having
        traceback.print_exc()
        return {"error": traceback.format_exc(limit=1).strip().splitlines()[-1]}
    finally:
        print(f"{name}: {time.perf_counter() - began_s:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
