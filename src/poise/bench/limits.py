"""Run a child process under limits that the kernel enforces: memory, page cache included, and disk reads.

A child joins its control groups before it becomes the program it is to run, so nothing escapes the count. Where a
limit cannot be set (no privilege, no controller), nothing fails: ``Limits.missing`` says so in plain words and the
caller marks its result. Every run gets fresh groups. Children, their children and the groups go when the block ends,
on Ctrl-C too; the kernel kills the child if this process is killed, and the next run removes the groups it left.

Pages that another process has already read are in the cache at nobody's cost: call ``forget_cached`` on the files
before a run. This is a harness for measuring, not a sandbox.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from poise.bench.groups import ControlGroups
from poise.bench.launch import ended_within, start, text_of
from poise.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildResult:
    """How a child ended. ``returncode`` is negative for a signal, as in ``subprocess``.

    ``peak_bytes`` is the control group's peak, page cache included; None where memory is not limited.
    ``read_bytes`` is what the kernel fetched from storage for it, page faults included; None where it is not counted.
    """

    returncode: int
    stdout: str
    stderr: str
    elapsed_s: float
    timed_out: bool
    out_of_memory: bool
    peak_bytes: int | None
    read_bytes: int | None


class Limits:
    """``with Limits(memory_bytes=…) as limits: limits.run([…])``. ``path`` names the disk whose reads are throttled."""

    def __init__(
        self, *, memory_bytes: int | None = None, read_bytes_per_s: int | None = None, path: Path | None = None
    ) -> None:
        assert read_bytes_per_s is None or path is not None, "a read limit needs a path, to know which disk it is for"
        assert memory_bytes is None or memory_bytes > 0, f"a memory limit is positive, not {memory_bytes}"
        assert read_bytes_per_s is None or read_bytes_per_s > 0, f"a read limit is positive, not {read_bytes_per_s}"
        self._memory_bytes = memory_bytes
        self._read_bytes_per_s = read_bytes_per_s
        self._path = path
        self._groups = ControlGroups()
        self._child: subprocess.Popen[bytes] | None = None
        self._used = False
        self.enforced: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float | None = None
    ) -> ChildResult:
        """Run ``argv`` to its end, or kill it after ``timeout_s``. ``env`` replaces the environment."""
        if self._used:  # the peak and the page cache of the last run must not count for this one
            self._close()
            self._open()
        self._used = True
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            try:
                return self._run(argv, env, timeout_s, stdout, stderr)
            finally:
                self._kill()

    def _run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        timeout_s: float | None,
        stdout: IO[bytes],
        stderr: IO[bytes],
    ) -> ChildResult:
        start_s = time.monotonic()
        self._child = child = start(argv, procs=self._groups.procs, env=env, stdout=stdout, stderr=stderr)
        timed_out = not ended_within(child.pid, timeout_s)
        os.killpg(child.pid, signal.SIGKILL)  # on time-out the child; always what it left behind in its session
        ended_within(child.pid, None)
        elapsed_s = time.monotonic() - start_s
        read_bytes = _storage_bytes_read(child.pid)
        child.wait()
        return ChildResult(
            returncode=child.returncode,
            stdout=text_of(stdout),
            stderr=text_of(stderr),
            elapsed_s=elapsed_s,
            timed_out=timed_out,
            out_of_memory=self._groups.is_out_of_memory,
            peak_bytes=self._groups.peak_bytes,
            read_bytes=read_bytes,
        )

    def _open(self) -> None:
        enforced, missing = [], []
        try:
            if self._memory_bytes is not None:
                name = f"memory {format_bytes(self._memory_bytes)}, page cache included"
                reason = self._groups.limit_memory(self._memory_bytes)
                enforced.append(name) if reason is None else missing.append(f"{name}: {reason}")
            if self._read_bytes_per_s is not None:
                name = f"disk reads {format_bytes(self._read_bytes_per_s)}/s"
                assert self._path is not None, "checked in the constructor"
                reason = self._groups.limit_reads(self._read_bytes_per_s, self._path)
                enforced.append(name) if reason is None else missing.append(f"{name}: {reason}")
        except BaseException:
            self._close()
            raise
        self.enforced, self.missing = tuple(enforced), tuple(missing)

    def _kill(self) -> None:
        """Kill an unfinished child and what it started in its session; those that left it go with their group."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
            child.wait()

    def _close(self) -> None:
        self._kill()
        self._groups.close()
        self._used = False


def forget_cached(*paths: Path) -> None:
    """Write back and drop the page cache of files, or of all files below directories, so that reads reach the disk."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _storage_bytes_read(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ", 1) for line in lines)["read_bytes"])
