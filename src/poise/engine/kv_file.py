"""The file in which keys and values lie that have left memory: where it may be, opening it, and whether it has room."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from poise.errors import UsageError
from poise.offload.kv_stream import KvStream
from poise.offload.scratch import too_full
from poise.profile.mounts import in_memory


def open_kv(directory: str | Path | None) -> KvStream:
    """``directory``: where scratch files go; None: where temporary files go. Raises UsageError for what is no disk."""
    path = Path(tempfile.gettempdir() if directory is None else directory)
    if not path.is_dir():
        raise UsageError(f"scratch_directory {path} is no directory; give one on a disk")
    if in_memory(path):
        raise UsageError(
            f"{path} is memory, so keys and values would not leave it; give a scratch_directory on a disk, or set TMPDIR"
        )
    if not os.access(path, os.W_OK):
        raise UsageError(f"scratch_directory {path} cannot be written to; give another")
    return KvStream(path)


def can_hold_kv(directory: str | Path | None) -> bool:
    """Whether ``open_kv`` would take the directory."""
    path = Path(tempfile.gettempdir() if directory is None else directory)
    return path.is_dir() and not in_memory(path) and os.access(path, os.W_OK)


def refuse_if_disk_is_full(kv: KvStream, nbytes: int) -> None:
    """Before anything runs: raises UsageError when the caches of the rows that run at once do not fit on the disk."""
    status = os.statvfs(kv.directory)
    if nbytes > status.f_bavail * status.f_frsize:
        raise too_full(kv.directory, nbytes)
