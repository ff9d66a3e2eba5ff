"""Threads that read extents of files into memory and say when they are there.

``O_DIRECT`` where the file system takes it, else buffered, said once. ``os.preadv`` releases the GIL, so reads run behind
compute. The caller bounds how many jobs are under way; jobs are done in the order they were submitted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from poise.errors import ReadError

logger = logging.getLogger(__name__)

Read = tuple[Path, int, int, memoryview]
"""(file, offset, bytes that must arrive, memory to fill)."""


class Reader:
    """``threads`` threads over one queue. Closing waits for the read that each is at."""

    def __init__(self, files: Sequence[Path], *, threads: int, direct: bool = True) -> None:
        self._direct = direct
        self._descriptors = {file: self._open(file) for file in dict.fromkeys(files)}
        self._jobs: queue.SimpleQueue[tuple[Sequence[Read], Callable[[Exception | None], None]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"poise-reader-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._direct

    def submit(self, reads: Sequence[Read], done: Callable[[Exception | None], None]) -> None:
        """Queues reads; ``done`` is called on a reader thread when all bytes are there, or with the error."""
        self._jobs.put((reads, done))

    def close(self) -> None:
        """Ends the threads and closes the files. Safe to call twice."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def _open(self, file: Path) -> int:
        if self._direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(file, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise ReadError(f"{file} cannot be opened: {error.strerror}") from None
                self._use_buffered(file)
        return os.open(file, os.O_RDONLY)

    def _use_buffered(self, file: Path) -> None:
        if self._direct:
            logger.warning("the file system of %s refuses O_DIRECT; reading through the page cache", file)
        self._direct = False

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            reads, done = job
            try:
                for read in reads:
                    self._fill(*read)
            except (OSError, ReadError) as error:
                done(error)
            else:
                done(None)

    def _fill(self, file: Path, offset: int, needed_bytes: int, memory: memoryview) -> None:
        descriptor = self._descriptors[file]
        done = 0
        while done < needed_bytes:
            try:
                count = os.preadv(descriptor, [memory[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not _end_direct(descriptor):
                    raise ReadError(f"reading {file} at byte {offset + done} failed: {error.strerror}") from None
                self._use_buffered(file)
                continue
            if count == 0:
                raise ReadError(f"{file} became shorter than its header says while it was being read")
            done += count


def _end_direct(descriptor: int) -> bool:
    """Turns ``O_DIRECT`` off for an open file; False when it was off."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
