"""Where an expert's bytes go when they are read: few, large, aligned reads into one slot.

Parts that lie near each other on disk become one extent; extents begin and end on multiples of ``ALIGNMENT``, as
``O_DIRECT`` asks, and lie one after the other in the slot. Pure arithmetic, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.model.checkpoint import TensorRef

ALIGNMENT = 4096
MAX_GAP_BYTES = 64 * 1024
"""Parts closer than this are read together: skipping less costs more than reading it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """One read. ``file_offset``, ``slot_offset`` and ``nbytes`` are aligned; the first ``needed_bytes`` must arrive."""

    file: Path
    file_offset: int
    nbytes: int
    needed_bytes: int
    slot_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """The reads of one expert. ``slot_offsets[part]`` is where that part begins in the slot; ``nbytes`` what it takes."""

    extents: tuple[Extent, ...]
    slot_offsets: Mapping[TensorRef, int]
    nbytes: int


def plan_reads(parts: Sequence[TensorRef]) -> ReadPlan:
    """Coalesces parts into aligned extents, in order of place on disk."""
    runs: list[list[TensorRef]] = []
    for part in sorted(parts, key=lambda part: (str(part.file), part.offset)):
        last = runs[-1][-1] if runs else None
        if last is not None and last.file == part.file and part.offset - (last.offset + last.nbytes) <= MAX_GAP_BYTES:
            runs[-1].append(part)
        else:
            runs.append([part])
    extents: list[Extent] = []
    slot_offsets: dict[TensorRef, int] = {}
    slot_offset = 0
    for run in runs:
        begin = run[0].offset // ALIGNMENT * ALIGNMENT
        needed = max(part.offset + part.nbytes for part in run) - begin
        nbytes = -(-needed // ALIGNMENT) * ALIGNMENT
        extents.append(
            Extent(file=run[0].file, file_offset=begin, nbytes=nbytes, needed_bytes=needed, slot_offset=slot_offset)
        )
        slot_offsets.update({part: slot_offset + part.offset - begin for part in run})
        slot_offset += nbytes
    return ReadPlan(extents=tuple(extents), slot_offsets=slot_offsets, nbytes=slot_offset)
