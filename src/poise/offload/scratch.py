"""A file that nobody else sees, for what leaves memory for a while, and the thread that reads and writes it behind compute.

The file has no name once it is open, so it is gone when the process ends, however it ends. Space is taken before it is
written to: a disk that is too full says so at once. ``O_DIRECT`` where the file system takes it, else buffered, said once.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import queue
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

from poise.errors import ReadError, UsageError
from poise.model.read_plan import ALIGNMENT
from poise.spec.timeline import DISK, Timeline
from poise.units import format_bytes

logger = logging.getLogger(__name__)


class Scratch:
    """One unnamed file in ``directory`` that grows; it ends when it is dropped. Raises UsageError where none can be made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._descriptor, name = tempfile.mkstemp(prefix="poise-scratch-", dir=directory)
            os.unlink(name)
        except OSError as error:
            raise UsageError(
                f"no scratch file can be made in {directory} ({error.strerror}); give a directory on a disk"
            ) from None
        self._end = weakref.finalize(self, os.close, self._descriptor)
        self.is_direct = _bypass_page_cache(self._descriptor)
        self._size = 0

    def grow(self, nbytes: int) -> int:
        """Takes ``nbytes`` more of the disk, rounded up to the alignment; returns where they begin.

        Raises UsageError where the disk is too full.
        """
        begin, nbytes = self._size, -(-nbytes // ALIGNMENT) * ALIGNMENT
        try:
            os.posix_fallocate(self._descriptor, begin, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise too_full(self._directory, nbytes) from None
        self._size += nbytes
        return begin

    def read(self, offset: int, memory: memoryview) -> None:
        """Fills ``memory``; offset, length and memory are aligned. Raises ReadError."""
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise self._failed("reading", error) from None
            assert count, "the scratch file ends before what was written to it"
            done += count

    def write(self, offset: int, memory: memoryview) -> None:
        """Writes ``memory``, all aligned. Raises ReadError."""
        done = 0
        while done < len(memory):
            try:
                done += os.pwritev(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise self._failed("writing", error) from None

    def close(self) -> None:
        """Gives the disk's space back. Safe to call twice."""
        self._end()

    def _failed(self, doing: str, error: OSError) -> ReadError:
        return ReadError(f"{doing} a scratch file in {self._directory} failed: {error.strerror}")


def too_full(directory: Path, nbytes: int) -> UsageError:
    """The error to raise where ``directory`` has no ``nbytes`` left."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    return UsageError(
        f"the disk of {directory} has {format_bytes(free)} free and keys and values need {format_bytes(nbytes)} more there; "
        "free some, give another directory, or keep them in memory"
    )


@dataclass(slots=True)
class Job:
    """A read or a write under way. ``timeline``: where it is noted, if anywhere."""

    scratch: Scratch
    is_write: bool
    offset: int
    memory: memoryview
    timeline: Timeline | None = None
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def wait(self) -> None:
        """Until it is done. Raises ReadError when it failed."""
        self.finish()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Until it is done, or has failed."""
        self.done.wait()


class ScratchThread:
    """Does jobs one after the other, in the order in which they were submitted. One that is dropped ends its thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs,), name="poise-reader-scratch", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._jobs, thread)
        self._end.atexit = False

    def submit(self, job: Job) -> None:
        """Queues a job."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread behind the jobs that were submitted. Safe to call twice."""
        self._end()


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while _do_next(jobs):
        pass


def _do_next(jobs: queue.SimpleQueue[Job | None]) -> bool:
    """Waits for a job and does it; False for the end. Once done, nothing of it is held."""
    job = jobs.get()
    if job is None:
        return False
    began_ns = perf_counter_ns()
    try:
        (job.scratch.write if job.is_write else job.scratch.read)(job.offset, job.memory)
    except Exception as error:  # noqa: BLE001 - carried to the compute thread, raised by wait()
        job.error = error
    if job.timeline is not None:
        name = "write cache" if job.is_write else "read cache"
        job.timeline.add(f"{DISK}: caches", name, began_ns, bytes=len(job.memory))
    job.done.set()
    return True


def _end(jobs: queue.SimpleQueue[Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():  # a collection of garbage may run on any thread
        thread.join()


def _bypass_page_cache(descriptor: int) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        logger.warning("the file system of the scratch directory refuses O_DIRECT; using the page cache")
        return False
    return True
