"""What every writer of a checkpoint needs: a directory that appears only when whole, shard names, the index."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from poise.errors import CheckpointError
from poise.model.checkpoint import INDEX_NAME, SINGLE_NAME
from poise.units import format_bytes

MAX_SHARD_BYTES = 2_000_000_000


@contextlib.contextmanager
def whole_directory(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends, and vanishes on any error or Ctrl-C.

    Raises CheckpointError when ``target`` exists, when less than ``needed_bytes`` are free, or when writing fails.
    """
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists and is not overwritten; remove it or choose another target")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < needed_bytes:
            needed = f"{target} needs {format_bytes(needed_bytes)} of disk, {format_bytes(free_bytes)} are free"
            raise CheckpointError(f"{needed}; choose a smaller model or another disk")
        partial.mkdir()
        yield partial
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be made: {error}; check the path, its permissions and the disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_index(directory: Path, names_by_shard: dict[str, Iterable[str]], total_bytes: int) -> None:
    """Writes ``model.safetensors.index.json``: which shard holds which tensor."""
    weight_map = {name: shard for shard, names in names_by_shard.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def shard_names(count: int) -> list[str]:
    """The usual file names of ``count`` shards."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
