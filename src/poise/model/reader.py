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
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns

from poise.errors import ReadError
from poise.spec.timeline import DISK, Timeline

logger = logging.getLogger(__name__)

Read = tuple[Path, int, int, memoryview]
"""(file, offset, bytes that must arrive, memory to fill)."""
Label = tuple[str, Mapping[str, int | str]]
"""What a timeline calls a job, and its numbers."""
Done = Callable[[Exception | None], None]
Jobs = queue.SimpleQueue[tuple[Sequence[Read], Done, Label] | None]


class Reader:
    """``threads`` threads over one queue. Closing waits for the read that each is at; one that is dropped closes itself."""

    def __init__(self, files: Sequence[Path], *, threads: int, direct: bool = True) -> None:
        self._files = _Files(files, direct=direct)
        self._jobs: Jobs = queue.SimpleQueue()
        # The threads hold the files and the queue, not the reader or who owns it: else neither would ever be dropped.
        started = [
            threading.Thread(target=_work, args=(self._files, self._jobs), name=f"poise-reader-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in started:
            thread.start()
        self._end = weakref.finalize(self, _end, self._files, self._jobs, started)
        self._end.atexit = False

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._files.is_direct

    @property
    def timeline(self) -> Timeline | None:
        """Where reads are noted, if anywhere."""
        return self._files.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._files.timeline = timeline

    def open(self, files: Sequence[Path]) -> None:
        """Opens further files to read from; those that are open stay so. Raises ReadError."""
        self._files.open(files)

    def submit(self, reads: Sequence[Read], done: Done, *, label: Label = ("read", {})) -> None:
        """Queues reads; ``done`` is called on a reader thread when all bytes are there, or with the error."""
        self._jobs.put((reads, done, label))

    def close(self) -> None:
        """Ends the threads and closes the files. Safe to call twice."""
        self._end()


class _Files:
    """Open files, and how they are read; shared by the threads."""

    def __init__(self, files: Sequence[Path], *, direct: bool) -> None:
        self.is_direct = direct
        self.timeline: Timeline | None = None
        self._falling_back = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        try:
            self.open(files)
        except BaseException:
            self.close()
            raise

    def open(self, files: Sequence[Path]) -> None:
        """Those that are not open yet."""
        for file in dict.fromkeys(files):
            if file not in self._descriptors:
                self._descriptors[file] = self._open(file)

    def fill(self, file: Path, offset: int, needed_bytes: int, memory: memoryview) -> None:
        """Reads at least ``needed_bytes`` into ``memory``. Raises ReadError."""
        descriptor = self._descriptors[file]
        done, again = 0, False
        while done < needed_bytes:
            try:
                count = os.preadv(descriptor, [memory[done:]], offset + done)
            except OSError as error:
                # Refused once, a read is tried again even if O_DIRECT is off by now: another thread may have turned it off.
                is_refused = error.errno == errno.EINVAL
                if not is_refused or (not self._end_direct(file) and again):
                    raise ReadError(f"reading {file} at byte {offset + done} failed: {error.strerror}") from None
                again = True
                continue
            if count == 0:
                raise ReadError(f"{file} became shorter than its header says while it was being read")
            done += count

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _open(self, file: Path) -> int:
        if self.is_direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(file, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise ReadError(f"{file} cannot be opened: {error.strerror}") from None
                self._use_buffered(file)
        return os.open(file, os.O_RDONLY)

    def _end_direct(self, file: Path) -> bool:
        """Turns ``O_DIRECT`` off for an open file; False when it was off."""
        with self._falling_back:
            flags = fcntl.fcntl(self._descriptors[file], fcntl.F_GETFL)
            if not flags & os.O_DIRECT:
                return False
            fcntl.fcntl(self._descriptors[file], fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._use_buffered(file)
        return True

    def _use_buffered(self, file: Path) -> None:
        if self.is_direct:
            logger.warning("the file system of %s refuses O_DIRECT; reading through the page cache", file)
        self.is_direct = False


def _work(files: _Files, jobs: Jobs) -> None:
    while _do_next(files, jobs):
        pass


def _do_next(files: _Files, jobs: Jobs) -> bool:
    """Waits for a job and does it; False for the end. Once done, nothing of it is held: its owner may be dropped."""
    job = jobs.get()
    if job is None:
        return False
    reads, done, (name, detail) = job
    began_ns = perf_counter_ns()
    try:
        for read in reads:
            files.fill(*read)
        if files.timeline is not None:
            files.timeline.add(f"{DISK}: {threading.current_thread().name}", name, began_ns, **detail)
    except (OSError, ReadError) as error:
        done(error)
    else:
        done(None)
    return True


def _end(files: _Files, jobs: Jobs, threads: Sequence[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # a collection of garbage may run on any thread
            thread.join()
    files.close()
