"""What the disk can deliver, measured without any of Poise's own readers: the yardstick for them.

Reads a scratch file of incompressible data with O_DIRECT into huge-page buffers, in order and at random, in several
block sizes, with one and two threads, round after round so that a passing disturbance hits every pattern alike. The
limit is the median rate of the best pattern; its spread is that pattern's slowest and fastest round. Where ``fio`` is
installed it reads the same file as a cross-check. A host that caches a virtual disk is measured with its cache.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from poise.bench.direct_read import PatternRate, ReadPattern, measure_patterns
from poise.bench.limits import forget_cached
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.errors import UsageError
from poise.profile.mounts import in_memory, mount_of
from poise.units import GIB, KIB, MIB, format_bytes

NAME = "disk"
PATTERNS = tuple(
    ReadPattern(order=order, block_bytes=block_bytes, threads=threads)
    for order in ("sequential", "random")
    for block_bytes in (256 * KIB, MIB, 4 * MIB, 16 * MIB)
    for threads in (1, 2)
)
_WRITE_BYTES = 8 * MIB
_FIO_RUN_S = 2


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench disk`: measure the disk that holds ``output``, or else the directory for temporary files."""
    directory = Path(tempfile.gettempdir()) if output is None else output
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Writing a scratch file", total=None)
        with scratch_file(directory, GIB) as path:
            progress.update(task, description="Reading the disk", total=1.0)
            rates = measure_patterns(
                path,
                PATTERNS,
                rounds=5,
                round_s=0.2,
                seed=0,
                on_progress=lambda share: progress.update(task, completed=share),
            )
            fio_bytes_per_s = _fio_rate(path)
    facts = stamp()
    results = _as_results(rates, fio_bytes_per_s, directory)
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        _print_table(rates, fio_bytes_per_s)
    if output is not None:
        written = write_result(output, NAME, facts, results, today=date.today())
        print(f"Wrote {written}", file=sys.stderr)


def best_of(rates: Sequence[PatternRate]) -> PatternRate:
    """The pattern with the highest median: what this disk can deliver."""
    return max(rates, key=lambda rate: rate.median_bytes_per_s)


@contextmanager
def scratch_file(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A file of ``size_bytes`` random bytes on the disk that holds ``directory``, gone when the block ends.

    Raises UsageError if the directory is missing, in memory, or on a disk without the room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        require_disk(directory, size_bytes)
    except OSError as error:
        raise UsageError(f"{directory} cannot be used ({error.strerror}); give a directory on the disk") from error
    random = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(prefix="poise-disk-", dir=directory) as file:
        for start in range(0, size_bytes, _WRITE_BYTES):
            file.write(random.bytes(min(_WRITE_BYTES, size_bytes - start)))
        file.flush()
        path = Path(file.name)
        forget_cached(path)
        yield path


def require_disk(directory: Path, size_bytes: int) -> None:
    """Raises UsageError if ``directory`` is in memory, or on a disk without room for ``size_bytes``."""
    free_bytes = shutil.disk_usage(directory).free
    if in_memory(directory):
        raise UsageError(f"{directory} is in memory, not on a disk; set TMPDIR to a directory on the disk")
    if free_bytes < size_bytes:
        raise UsageError(
            f"{directory} has {format_bytes(free_bytes)} free, and {format_bytes(size_bytes)} are needed; "
            "free some space, or set TMPDIR to a directory on another disk"
        )


def _fio_rate(path: Path) -> float | None:
    """Bytes per second of fio's sequential direct reads; None where fio is not installed or does not answer."""
    if shutil.which("fio") is None:
        return None
    options = {"rw": "read", "bs": "4M", "direct": "1", "ioengine": "psync", "runtime": str(_FIO_RUN_S)}
    argv = ["fio", "--name=poise", f"--filename={path}", "--readonly", "--time_based", "--output-format=json"]
    argv += [f"--{option}={value}" for option, value in options.items()]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10 * _FIO_RUN_S, check=True)
        return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError) as error:
        print(f"fio gave no cross-check: {error}", file=sys.stderr)
        return None


def _as_results(rates: Sequence[PatternRate], fio_bytes_per_s: float | None, directory: Path) -> dict[str, object]:
    best, mount = best_of(rates), mount_of(directory)
    return {
        "file_system": mount.kind if mount else None,
        "limit_bytes_per_s": best.median_bytes_per_s,
        "limit_spread_bytes_per_s": [min(best.rounds_bytes_per_s), max(best.rounds_bytes_per_s)],
        "limit_pattern": asdict(best.pattern),
        "fio_bytes_per_s": fio_bytes_per_s,
        "patterns": [asdict(rate.pattern) | {"rounds_bytes_per_s": list(rate.rounds_bytes_per_s)} for rate in rates],
    }


def _print_table(rates: Sequence[PatternRate], fio_bytes_per_s: float | None) -> None:
    table = Table("order", "block", "threads", title="Direct reads into huge pages, GB/s")
    for column in ("median", "slowest", "fastest"):
        table.add_column(column, justify="right")
    for rate in rates:
        rounds = rate.rounds_bytes_per_s
        figures = (f"{figure / 1e9:.2f}" for figure in (statistics.median(rounds), min(rounds), max(rounds)))
        table.add_row(rate.pattern.order, format_bytes(rate.pattern.block_bytes), str(rate.pattern.threads), *figures)
    best = best_of(rates)
    console = Console()
    console.print(table)
    console.print(
        f"The disk delivers {best.median_bytes_per_s / 1e9:.2f} GB/s: {best.pattern.order}, "
        f"{format_bytes(best.pattern.block_bytes)} blocks, {best.pattern.threads} thread(s)."
    )
    if fio_bytes_per_s is not None:
        console.print(f"fio, sequential, 4 MiB blocks into ordinary pages: {fio_bytes_per_s / 1e9:.2f} GB/s.")
