"""Benchmarks and their harness: kernel-enforced limits, baselines, stamped result files.

``run_benchmark`` finds a benchmark by name and imports it then, so that importing this package loads no torch. A
benchmark is a module with ``run(output: Path | None, json_output: bool) -> None``: it prints a table, or one JSON
document, and writes a dated result file below ``output`` if that is given.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import MappingProxyType

from poise.errors import UsageError

BENCHMARKS = MappingProxyType(
    {
        "disk": "poise.bench.disk",
        "int4": "poise.bench.int4",
        "kv": "poise.bench.kv_stream",
        "offload": "poise.bench.offload.paper",
        "offload-ablation": "poise.bench.offload.ablation",
        "offload-alike": "poise.bench.offload.like_for_like",
        "prefetch": "poise.bench.prefetch",
        "prefetch-engine": "poise.bench.prefetch_engine",
        "reader": "poise.bench.reader",
    }
)
"""Name on the command line to module."""


def run_benchmark(name: str, *, output: Path | None, json_output: bool) -> None:
    """Run the benchmark called ``name``. Raises UsageError, listing the names, if there is none."""
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name!r}; choose from: {', '.join(sorted(BENCHMARKS))}")
    importlib.import_module(BENCHMARKS[name]).run(output, json_output)
