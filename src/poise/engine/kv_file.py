"""The file in which keys and values lie that have left memory: where it may be, opening it, and whether it has room."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poise.engine.batch import Row, final_tokens, in_batches
from poise.errors import UsageError
from poise.model.cache import make_cache, movable_layers, needs_equal_rows
from poise.model.read_plan import ALIGNMENT
from poise.offload.kv_places import FilePlace
from poise.offload.kv_stream import KvStream
from poise.offload.scratch import too_full
from poise.plan.group import GroupShape
from poise.plan.memory import CACHE_LINE
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
    return KvStream(FilePlace(path))


def can_hold_kv(directory: str | Path | None) -> bool:
    """Whether ``open_kv`` would take the directory."""
    path = Path(tempfile.gettempdir() if directory is None else directory)
    return path.is_dir() and not in_memory(path) and os.access(path, os.W_OK)


def kv_file_bytes(model: Any, rows: Sequence[Row], group: GroupShape, *, bytes_per_token: int) -> int:
    """What the caches of the batches that run at once take there, if those take most; ``bytes_per_token`` of one row move.

    As ``offload.kv_stream`` lays them out: per batch and layer a stretch for the final length, each token of all rows in an odd
    number of cache lines. The layers that move are taken to be alike.
    """
    layers = len(movable_layers(model, make_cache(model)))
    if not layers:
        return 0
    taken = []
    for batch in in_batches(rows, group.batch_size, equal_rows=needs_equal_rows(model)):
        lines = -(-len(batch) * bytes_per_token // (layers * CACHE_LINE)) | 1
        taken.append((_up(final_tokens(batch) * lines * CACHE_LINE) * layers, len(batch)))
    total, left = 0, group.max_rows
    for nbytes, size in sorted(taken, reverse=True):
        if size <= left:
            total, left = total + nbytes, left - size
    return total


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def refuse_if_disk_is_full(kv: KvStream, nbytes: int) -> None:
    """Before anything runs: raises UsageError when the caches of the rows that run at once do not fit on the disk."""
    assert isinstance(kv.place, FilePlace), "caches on disk lie in files"
    status = os.statvfs(kv.place.directory)
    if nbytes > status.f_bavail * status.f_frsize:
        raise too_full(kv.place.directory, nbytes)
