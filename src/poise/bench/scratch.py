"""A directory for a benchmark's files, gone when it is done; those of benchmarks that were killed go when the next one starts.

Whoever has made one holds a lock on it, which the kernel lets go of with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_PREFIX = "poise-scratch-"
_FRESH_S = 60.0
"""A directory so new may be about to be locked."""


class Scratch:
    """A context manager; ``path`` is the directory, in the system's one for temporary files."""

    def __init__(self) -> None:
        remove_stale()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes it. Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def remove_stale() -> tuple[Path, ...]:
    """Removes directories of this user that no process holds; returns them."""
    removed = []
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = directory.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_ctime < _FRESH_S:
                continue
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
                removed.append(directory)
            finally:
                os.close(lock)
    return tuple(removed)
