"""Timed O_DIRECT reads of one file into huge-page buffers: the disk yardstick, which shares nothing with poise.offload.

``measure_patterns`` goes through all patterns once per round, so that a disturbance of the machine is spread over them.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from poise.errors import UsageError
from poise.units import MIB

ALIGNMENT_BYTES = 4096
"""Offsets and lengths of direct reads are multiples of the device's block, which is at most this."""

_HUGE_PAGE_BYTES = 2 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPattern:
    """How a file is read: ``threads`` threads, each with one read of ``block_bytes`` under way.

    Each thread fills ``buffers`` buffers in turn. A single small one stays in the processor's cache, into which a disk
    delivers faster than into memory: no yardstick for a reader whose data goes to many places.
    """

    order: Literal["sequential", "random"]
    block_bytes: int
    threads: int
    buffers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternRate:
    """The rate of one pattern in each round."""

    pattern: ReadPattern
    rounds_bytes_per_s: tuple[float, ...]

    @property
    def median_bytes_per_s(self) -> float:
        return statistics.median(self.rounds_bytes_per_s)


def measure_patterns(
    path: Path,
    patterns: Sequence[ReadPattern],
    *,
    rounds: int,
    round_s: float,
    seed: int,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[PatternRate, ...]:
    """Read ``path`` in each pattern for ``round_s`` seconds, ``rounds`` times. ``on_progress`` is told the share done.

    Raises UsageError if the file system does no direct reads.
    """
    random = np.random.default_rng(seed)
    rates: dict[ReadPattern, list[float]] = {pattern: [] for pattern in patterns}
    with _open_direct(path) as descriptor:
        for number in range(rounds * len(patterns)):
            pattern = patterns[number % len(patterns)]
            rates[pattern].append(_measure(descriptor, pattern, round_s, random))
            if on_progress is not None:
                on_progress((number + 1) / (rounds * len(patterns)))
    return tuple(PatternRate(pattern=pattern, rounds_bytes_per_s=tuple(rate)) for pattern, rate in rates.items())


@contextmanager
def huge_page_buffer(size_bytes: int) -> Iterator[memoryview]:
    """Writable anonymous memory, 2 MiB aligned and in huge pages where the kernel has them; unmapped at the end."""
    area = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % _HUGE_PAGE_BYTES
        with memoryview(area) as whole, whole[start : start + size_bytes] as buffer:
            buffer[:: mmap.PAGESIZE] = bytes(len(buffer[:: mmap.PAGESIZE]))  # fault the pages in, outside the timing
            yield buffer
    finally:
        area.close()


def _measure(descriptor: int, pattern: ReadPattern, duration_s: float, random: np.random.Generator) -> float:
    """Bytes per second of all threads together, from the common start to the end of the last read."""
    size_bytes = os.fstat(descriptor).st_size
    blocks = size_bytes // pattern.block_bytes
    assert pattern.block_bytes % ALIGNMENT_BYTES == 0, f"blocks of {pattern.block_bytes} bytes are not aligned"
    assert blocks >= pattern.threads, f"a file of {size_bytes} bytes is too small for {pattern}"
    start = threading.Barrier(pattern.threads)

    def read_all(thread: int, seed: int) -> tuple[int, float, float]:
        order = _block_order(pattern, thread, blocks, np.random.default_rng(seed))
        with huge_page_buffer(pattern.block_bytes * pattern.buffers) as memory:
            begins = itertools.cycle(range(0, len(memory), pattern.block_bytes))
            start.wait()
            start_s = now_s = time.perf_counter()
            bytes_read = 0
            while now_s < start_s + duration_s:
                begin = next(begins)
                buffer = memory[begin : begin + pattern.block_bytes]
                bytes_read += os.preadv(descriptor, [buffer], next(order) * pattern.block_bytes)
                buffer.release()
                now_s = time.perf_counter()
        return bytes_read, start_s, now_s

    with ThreadPoolExecutor(pattern.threads) as pool:
        seeds = [int(seed) for seed in random.integers(1 << 31, size=pattern.threads)]
        parts = list(pool.map(read_all, range(pattern.threads), seeds))
    sizes, starts_s, ends_s = zip(*parts, strict=True)
    return float(sum(sizes) / (max(ends_s) - min(starts_s)))


def _block_order(pattern: ReadPattern, thread: int, blocks: int, random: np.random.Generator) -> Iterator[int]:
    """Block numbers without end: any block, or a share of the file per thread in order from a random start."""
    if pattern.order == "random":
        while True:
            yield from (int(block) for block in random.permutation(blocks))
    share = blocks // pattern.threads
    position = int(random.integers(share))
    while True:
        yield thread * share + position
        position = (position + 1) % share


@contextmanager
def _open_direct(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise UsageError(
            f"{path.parent} does no direct reads ({error.strerror}); set TMPDIR to a directory on a local disk"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
