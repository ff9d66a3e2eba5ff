"""Benchmarks and their harness: kernel-enforced limits, baselines, stamped result files.

``run_benchmark`` finds a benchmark by name and imports it then, so that importing this package loads no torch. A
benchmark is a module with ``run(output: Path | None, json_output: bool) -> None``: it prints a table, or one JSON
document, and writes a dated result file below ``output`` if that is given. A long one has ``PARTS``, and takes ``parts`` to
run and how many decode ``steps`` to measure besides (``bench.parts``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from poise.errors import UsageError

BENCHMARKS = MappingProxyType(
    {
        "balance": "poise.bench.balance.run",
        "disk": "poise.bench.disk",
        "exchange": "poise.bench.cluster.exchange",
        "int4": "poise.bench.int4",
        "kv": "poise.bench.kv_stream",
        "lookahead": "poise.bench.lookahead.run",
        "offload": "poise.bench.offload.paper",
        "offload-ablation": "poise.bench.offload.ablation",
        "offload-alike": "poise.bench.offload.like_for_like",
        "offload-llama": "poise.bench.offload.llama",
        "offload-planner": "poise.bench.offload.planner",
        "parallel": "poise.bench.parallel.run",
        "place": "poise.bench.place.run",
        "prefetch": "poise.bench.prefetch",
        "prefetch-engine": "poise.bench.prefetch_engine",
        "reader": "poise.bench.reader",
    }
)
"""Name on the command line to module."""
SUITES = MappingProxyType({"parallel": MappingProxyType({"probe": "poise.bench.parallel.probe"})})
"""Of a benchmark, further ones under its name."""


def run_benchmark(
    name: str,
    *,
    output: Path | None,
    json_output: bool,
    suite: str | None = None,
    parts: Sequence[str] = (),
    steps: int | None = None,
) -> None:
    """Run the benchmark called ``name``, or a suite of it. Raises UsageError, listing the names, if there is none, or no such
    suite or part of it."""
    module = importlib.import_module(_module_of(name, suite))
    if steps is not None and steps < 1:
        raise UsageError(f"--steps is {steps}; at least one must be measured")
    known: Sequence[str] = getattr(module, "PARTS", ())
    if not known:
        if parts or steps is not None:
            raise UsageError(f"benchmark {name!r} has no parts; leave out --part and --steps")
        module.run(output, json_output)
        return
    for part in parts:
        if part not in known:
            of = name if suite is None else f"{name}, suite {suite},"
            raise UsageError(f"benchmark {of} has no part {part!r}; choose from: {', '.join(known)}")
    module.run(output, json_output, parts=parts, steps=steps)


def _module_of(name: str, suite: str | None) -> str:
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name!r}; choose from: {', '.join(sorted(BENCHMARKS))}")
    if suite is None:
        return BENCHMARKS[name]
    suites = SUITES.get(name)
    if suites is None:
        raise UsageError(f"benchmark {name!r} has no suites; leave out --suite")
    if suite not in suites:
        raise UsageError(f"benchmark {name!r} has no suite {suite!r}; choose from: {', '.join(suites)}")
    return suites[suite]
