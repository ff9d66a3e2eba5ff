"""Klotski's own setting on one GPU: a Mixtral in DRAM, a device that holds a quarter of it, long prompts, short answers.

    python benchmarks/gpu/klotski.py --layers 8 --runs 64:planned --scratch /dev/shm --seconds 120 --output benchmarks/results

The checkpoint has Mixtral-8x7B's layers, fewer of them (``checkpoint``), and the device as much less memory than 24 GB.
Contenders (``contenders``) run one after the other, each in a process of its own; one that fails is printed in full and the
others go on. Tokens per second are generated tokens over prefill and decode. Beside them: the bytes that must come
over the bus at least, and the share of that limit. What ended is written to a result file, and to standard output as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

PAPER_LAYERS, PAPER_DEVICE_BYTES = 32, 24 * 10**9
NEW_TOKENS = 32
KV_BYTES_PER_TOKEN_LAYER = 4096
BESIDE_WEIGHTS_BYTES = 5 * 10**9
"""What Accelerate needs on the device beside weights that stay and caches: a layer that passes through, activations."""

ACCELERATE_S = 34
"""Kept for each of its batch sizes, whatever Poise takes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the checkpoint, runs the contenders, writes the result."""
    options = _parser().parse_args(arguments)
    if options.contender:
        _contend(options)
        return
    ends_s = time.monotonic() + options.seconds
    scratch = Path(tempfile.mkdtemp(prefix="poise-klotski-", dir=options.scratch))
    model = options.model or str(scratch / "model")
    results: dict[str, Any] = {"layers": options.layers, "device_bytes": _device_bytes(options), "contenders": {}}
    try:
        began_s = time.monotonic()
        if options.model is None:
            _run(["--contender", "make", "--model", model, *_shape(options)], ends_s)
        results["make_s"] = time.monotonic() - began_s
        for name, flags in _contenders(options):
            began_s = time.monotonic()
            kept_s = ACCELERATE_S * len(options.accelerate) if name == "poise" else 0
            found = _run(["--model", model, *flags], ends_s - kept_s) or {}
            for variant, figures in found.items():
                results["contenders"][f"{name}, {variant}"] = figures
                _print_line(f"{name}, {variant}", figures)
            print(f"   {time.monotonic() - began_s:.0f} s in all", flush=True)
            _write(options, results, is_last=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _write(options, results, is_last=True)


def _shape(options: argparse.Namespace) -> list[str]:
    return ["--layers", str(options.layers), "--divide", str(options.divide), "--device", options.device]


def _contenders(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    device = str(_device_bytes(options))
    common = ["--prompt-tokens", str(options.prompt_tokens), "--device", options.device]
    new = ["--new-tokens", str(options.new_tokens)]
    tiers = ["--contender", "poise", *common, "--device-memory", device]
    batches = ["--batches", str(options.batches)] if options.batches else []
    yield "poise", [*tiers, *new, "--memory", str(options.memory), "--runs", *options.runs, *batches]
    for size in options.accelerate:
        caches = size * (options.prompt_tokens + options.new_tokens) * KV_BYTES_PER_TOKEN_LAYER * options.layers
        weights = max(10**9, _device_bytes(options) - BESIDE_WEIGHTS_BYTES - caches)
        timed = ["--timed-tokens", str(options.timed_tokens), "--weights-bytes", str(weights)]
        yield "accelerate", ["--contender", "accelerate", *common, *new, *timed, "--batch-size", str(size)]
    if options.short_memory:
        few = ["--new-tokens", str(options.short_new_tokens), "--memory", options.short_memory]
        yield f"poise, {options.short_memory} of DRAM", [*tiers, *few, "--runs", options.runs[0]]


def _run(flags: Sequence[str], ends_s: float) -> dict[str, Any] | None:
    """What the contender's last line says, which holds all that it has finished; None where it failed, which is printed."""
    left_s = ends_s - time.monotonic()
    print(f"== {' '.join(flags)} ({left_s:.0f} s left)", flush=True)
    if left_s < 5:
        print("   no time left", flush=True)
        return None
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags], stdout=subprocess.PIPE, timeout=left_s, text=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        print(f"   took longer than {left_s:.0f} s", flush=True)
        return _last(error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or "")
    if done.returncode:
        print(f"   ended with {done.returncode}", flush=True)
    return _last(done.stdout)


def _last(said: str) -> dict[str, Any] | None:
    """The last whole line."""
    lines = said.rpartition("\n")[0].splitlines()
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found


def _contend(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(8)
    if options.contender == "make":
        from checkpoint import config_of, write

        write(Path(options.model), config_of(options.layers, options.divide), torch.device(options.device))
        return
    import contenders

    found = {}
    for variant, figures in getattr(contenders, options.contender)(options):
        found[variant] = figures
        print(json.dumps(found), flush=True)


def _print_line(name: str, found: Mapping[str, Any]) -> None:
    if "tokens_per_s" not in found:
        print(f"   {name}: {json.dumps(found)}", flush=True)
        return
    line = f"   {name}: {found['tokens_per_s']:.2f} tokens/s with {found['rows']} rows"
    if "limit" in found:
        limit = found["limit"]
        line += (
            f"; limit {limit['seconds']:.2f} s (bus {limit['copy_s']:.2f}, compute {limit['compute_s']:.2f}) of "
            f"{found['elapsed_s']:.2f} s: {limit['seconds'] / found['elapsed_s']:.0%}; "
            f"copied {found['copied_bytes'] / 1e9:.1f} GB "
            f"where {limit['must_bytes'] / 1e9:.1f} must, at {found['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    if found.get("caches_read_bytes"):
        line += (
            f"; caches: {found['caches_read_bytes'] / 1e9:.1f} GB there, {found['caches_written_bytes'] / 1e9:.1f} back"
        )
        line += f", all copies {found['limit']['with_caches_s']:.2f} s"
    peak = found.get("peak_device_bytes")
    line += "" if peak is None else f"; device peak {peak / 1e9:.2f} GB"
    print(line, flush=True)


def _write(options: argparse.Namespace, results: Mapping[str, Any], *, is_last: bool) -> None:
    """After every contender, so that what ended is there whatever happens later."""
    from poise.bench.machine import stamp
    from poise.bench.results import write_result

    whole = {**results, "gpu": _gpu()}
    if options.output is not None:
        path = write_result(options.output, "gpu-klotski", stamp(), whole, today=date.today(), overwrite=True)
        if is_last:
            print(f"Wrote {path}", flush=True)
    if is_last:
        print(json.dumps(whole), flush=True)


def _gpu() -> str:
    asked = ["nvidia-smi", "--format=csv,noheader"]
    asked.append("--query-gpu=name,memory.total,pcie.link.gen.current,pcie.link.width.current")
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"


def _device_bytes(options: argparse.Namespace) -> int:
    return options.device_bytes or PAPER_DEVICE_BYTES * options.layers // PAPER_LAYERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Offload on one GPU, in Klotski's setting.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--divide", type=int, default=1, help="widths by this, to try the benchmark itself")
    parser.add_argument("--model", help="a checkpoint that was made before")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=["64:planned", "64:whole-layer"],
        help="SIZE|any:POLICY[:kept]|explain|capped, of Poise",
    )
    parser.add_argument("--batches", type=int, default=0, help="n; 0: as planned")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-bytes", type=int, default=0)
    parser.add_argument("--memory", default="60GB", help="of DRAM, for Poise")
    parser.add_argument("--accelerate", type=int, nargs="*", default=[64], help="batch sizes of Accelerate")
    parser.add_argument("--short-memory", help="a run of Poise with so little DRAM that experts come from the disk")
    parser.add_argument("--short-new-tokens", type=int, default=8, help="of that run")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--timed-tokens", type=int, default=4, help="that Accelerate generates")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--output", type=Path)
    inner = parser.add_argument_group("of a contender")
    inner.add_argument("--contender", choices=("make", "poise", "accelerate"))
    inner.add_argument("--batch-size", type=int)
    inner.add_argument("--device-memory")
    inner.add_argument("--weights-bytes", type=int)
    return parser


if __name__ == "__main__":
    main()
