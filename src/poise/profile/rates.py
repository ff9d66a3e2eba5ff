"""Rates of moving bytes: copies in memory, and reads of experts from the disk by the engine's own reader."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from poise.errors import ReadError, UsageError
from poise.model.arena import Arena
from poise.model.checkpoint import TensorRef
from poise.model.read_plan import ReadPlan, plan_reads
from poise.model.reader import Reader
from poise.profile.measure import Clock, Run
from poise.profile.mounts import in_memory
from poise.units import MIB

COPY_BYTES = 128 * MIB
"""More than a processor's cache holds."""
SCRATCH_BYTES = 512 * MIB
READ_BYTES = 256 * MIB
"""Read by one run: enough that its beginning and end do not count, nor the bursts of a throttled disk: under a limit of 1 GB/s,
runs of 64 MiB showed 0.75 to 1.8 GB/s, of 256 MiB 0.93 to 1.12."""
READER_THREADS = 2
"""As the engine has."""
SLOTS = 8
_WRITE_BYTES = 8 * MIB


def copy_run(nbytes: int = COPY_BYTES, clock: Clock = time.perf_counter) -> Run:
    """A run that copies ``nbytes`` from one place in memory to another."""
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)

    def run() -> tuple[float, ...]:
        begin = clock()
        target.copy_(source)
        return (clock() - begin,)

    return run


class ExpertReads:
    """Experts read one after the other, over and over, into a few slots; a context manager that ends the reader's threads."""

    def __init__(self, experts: Sequence[Sequence[TensorRef]], clock: Clock = time.perf_counter) -> None:
        self._plans = [plan_reads(parts) for parts in experts]
        self._arena = Arena(SLOTS, max(plan.nbytes for plan in self._plans))
        files = [extent.file for plan in self._plans for extent in plan.extents]
        self._reader = Reader(files, threads=READER_THREADS)
        self._clock = clock
        each = sum(plan.nbytes for plan in self._plans) / len(self._plans)
        self._next = itertools.cycle(range(len(self._plans)))
        self._per_run = max(1, round(READ_BYTES / each))
        self.bytes_per_run = sum(part.nbytes for parts in experts for part in parts) / len(experts) * self._per_run

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is bypassed; else the rate may be that of memory."""
        return self._reader.is_direct

    def run(self) -> tuple[float, ...]:
        """Seconds for ``bytes_per_run`` (on average, where experts differ in size)."""
        begin = self._clock()
        chosen = [self._plans[next(self._next)] for _ in range(self._per_run)]
        _read_all(self._reader, [(plan, place % SLOTS) for place, plan in enumerate(chosen)], self._arena)
        return (self._clock() - begin,)

    def __enter__(self) -> ExpertReads:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def read_into_slots(files: Sequence[Path], plans: Sequence[ReadPlan], arena: Arena) -> None:
    """Reads every plan into the slot of its number. Raises ReadError."""
    reader = Reader(files, threads=READER_THREADS)
    try:
        _read_all(reader, [(plan, slot) for slot, plan in enumerate(plans)], arena)
    finally:
        reader.close()


@contextmanager
def scratch_experts(expert_bytes: int, folder: Path | None = None) -> Iterator[list[list[TensorRef]]]:
    """Experts of random bytes in a file that is gone when the block ends.

    Raises UsageError if the folder for temporary files is in memory or cannot be written.
    """
    folder = folder or Path(tempfile.gettempdir())
    if in_memory(folder):
        raise UsageError(
            f"{folder} is in memory, not on a disk; set TMPDIR to a directory on the disk, or name a MODEL"
        )
    count = max(1, min(SCRATCH_BYTES // expert_bytes, 4096))
    random = np.random.default_rng(0)
    try:
        with tempfile.NamedTemporaryFile(prefix="poise-profile-", dir=folder) as file:
            for begin in range(0, count * expert_bytes, _WRITE_BYTES):
                file.write(random.bytes(min(_WRITE_BYTES, count * expert_bytes - begin)))
            file.flush()
            path = Path(file.name)
            yield [
                [
                    TensorRef(
                        name=f"expert {index}",
                        file=path,
                        dtype="U8",
                        shape=(expert_bytes,),
                        offset=index * expert_bytes,
                        nbytes=expert_bytes,
                    )
                ]
                for index in range(count)
            ]
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); set TMPDIR to another directory") from None


def _read_all(reader: Reader, jobs: Sequence[tuple[ReadPlan, int]], arena: Arena) -> None:
    """Hands all jobs (a plan, its slot) to the reader and waits for the last. Raises ReadError."""
    errors: list[Exception] = []
    left = len(jobs)
    all_done = threading.Condition()

    def done(error: Exception | None) -> None:
        nonlocal left
        with all_done:
            left -= 1
            if error is not None:
                errors.append(error)
            all_done.notify()

    for plan, slot in jobs:
        reader.submit(
            [
                (each.file, each.file_offset, each.needed_bytes, arena.view_of(slot, each.slot_offset, each.nbytes))
                for each in plan.extents
            ],
            done,
        )
    with all_done:
        all_done.wait_for(lambda: left == 0)
    if errors:
        raise errors[0] if isinstance(errors[0], ReadError) else ReadError(str(errors[0]))
