"""Makes the 4-bit store: expert by expert from the checkpoint, file by file into the cache.

A file gets its name when it is whole and on the disk, the manifest comes last. So a making that was killed goes on behind its
last whole file, and nothing partial is ever taken for a store. One process makes a store at a time. Memory holds one expert.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, TensorRef
from poise.model.dense import read_tensor
from poise.model.dequantise import dequantised
from poise.model.int4 import Rounded, quantise
from poise.model.int4_store import (
    MANIFEST,
    Int4Store,
    PlannedExpert,
    Shard,
    ShardFacts,
    facts_of,
    header,
    manifest,
    open_store,
)
from poise.model.layout import CheckpointLayout, ExpertSource, convert_expert
from poise.model.scaled import Stored
from poise.units import format_bytes

OnMade = Callable[[int, int], None]
"""Told how many experts are made, and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """What a store is made from. ``dtype``: that of the checkpoint's weights; ``transposed``: matrices are (K, N)."""

    checkpoint: Checkpoint
    layout: CheckpointLayout
    model: Any
    dtype: torch.dtype
    transposed: bool

    @torch.inference_mode()
    def rounded(self, planned: PlannedExpert) -> dict[str, Rounded]:
        """One expert's matrices, by parameter. Raises CheckpointError for weights that are not finite."""
        source = replace(self.layout.experts_LE[planned.layer][planned.expert], dtype=self.dtype)
        raw = {part: self._read(part) for recipe in source.recipes for part in recipe.parts}
        weights = convert_expert(source, raw, self.model, self.model.config)
        del raw
        result = {}
        for param in planned.matrices:
            weight = weights.pop(param)
            bias = weights.get(f"{param}_bias")
            result[param] = quantise(weight.t() if self.transposed else weight, bias)
            if not math.isfinite(result[param].squared_error):
                raise CheckpointError(
                    f"{param} of expert {source.expert} in {source.module} holds NaN or infinite weights; fetch the "
                    "checkpoint again"
                )
        return result

    def _read(self, part: Stored) -> torch.Tensor:
        if isinstance(part, TensorRef):
            return read_tensor(part)
        return dequantised(part, read_tensor(part.values), read_tensor(part.scales), self.dtype)


def making_bytes(source: ExpertSource, dtype: torch.dtype) -> int:
    """Memory that making a store takes at most: an expert as it is read and as the model has it, and what it becomes."""
    return 3 * sum(math.prod(shape) for shape in source.shapes.values()) * dtype.itemsize


def make_store(
    original: Original, directory: Path, shards: Sequence[Shard], on_made: OnMade, *, waits: bool = False
) -> Int4Store:
    """Makes what is missing of a store. ``waits``: until another process that makes it has ended.

    Raises CheckpointError when the disk is too small or fails, ReadError likewise.
    """
    total = sum(len(shard.experts) for shard in shards)
    with _reporting(directory), _locked(directory, waits):
        found = [facts_of(shard) for shard in shards]
        _require_disk(directory, sum(shard.nbytes for shard, facts in zip(shards, found, strict=True) if not facts))
        done = sum(len(shard.experts) for shard, facts in zip(shards, found, strict=True) if facts)
        on_made(done, total)
        all_facts = []
        for shard, facts in zip(shards, found, strict=True):
            if facts is None:
                facts = _make_shard(original, shard, functools.partial(_told, on_made, done, total))
                done += len(shard.experts)
            all_facts.append(facts)
        with _whole_file(directory / MANIFEST) as file:
            file.write(manifest(original.checkpoint, shards, all_facts).encode())
    store = open_store(directory, shards)
    assert store is not None, "the manifest was written"
    return store


def _told(on_made: OnMade, before: int, total: int, count: int) -> None:
    on_made(before + count, total)


def _make_shard(original: Original, shard: Shard, on_made: Callable[[int], None]) -> ShardFacts:
    checksums, errors = [], []
    with _whole_file(shard.file) as file:
        file.seek(shard.header_bytes)
        for count, planned in enumerate(shard.experts, start=1):
            rounded = original.rounded(planned)
            checksum = 0
            for each in rounded.values():
                weight = each.weight
                for tensor in (weight.packed_NK, weight.scale_zero_GN2, weight.bias_N):
                    if tensor is not None:
                        view = memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
                        checksum = zlib.crc32(view, checksum)
                        file.write(view)
            if planned.padding is not None:
                file.write(bytes(planned.padding.nbytes))
            checksums.append(checksum)
            errors.append(_relative_error(list(rounded.values())))
            on_made(count)
        facts = ShardFacts(checksums=tuple(checksums), errors=tuple(float(f"{error:.4e}") for error in errors))
        file.seek(0)
        file.write(header(shard, facts))
    return facts


def _relative_error(rounded: Sequence[Rounded]) -> float:
    norm = sum(each.squared_norm for each in rounded)
    return math.sqrt(sum(each.squared_error for each in rounded) / norm) if norm else 0.0


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on the disk; it is not left in the page cache."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.rename(path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path, waits: bool) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise CheckpointError(
                f"another process is making the 4-bit store {directory}; run this again when it has finished"
            ) from None
        yield


@contextlib.contextmanager
def _reporting(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"the disk of {directory} became full while the 4-bit store was made; free some space, or set "
                "XDG_CACHE_HOME to a directory on a larger disk: what is made is kept"
            ) from None
        raise CheckpointError(
            f"the 4-bit store {directory} cannot be made ({error.strerror or error}); set XDG_CACHE_HOME to a directory "
            "that can be written"
        ) from None


def _require_disk(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"the 4-bit store needs {format_bytes(needed_bytes)} of disk in {directory}, {format_bytes(free_bytes)} are "
            "free; free some space, or set XDG_CACHE_HOME to a directory on a larger disk"
        )
