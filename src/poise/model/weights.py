"""From the bytes in a slot to the weights an expert computes with.

Where the bytes on disk are the weights, tensors are laid over the slot and nothing is copied. Quantised bytes may stay in
the slot as they are, so that more experts stay in memory, and become weights in a scratch area at each use. Otherwise
(another dtype, a layout that transformers converts) the bytes were read into a staging area and weights go into the slot.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from poise.errors import ReadError
from poise.model.arena import Arena
from poise.model.checkpoint import TensorRef
from poise.model.dense import as_tensor
from poise.model.dequantise import dequantise_into, dequantised, rows_shape
from poise.model.int4 import Int4Weight, padded_shape
from poise.model.layout import CheckpointLayout, ExpertSource, Weights, convert_expert
from poise.model.read_plan import ReadPlan, plan_reads
from poise.model.scaled import Int4Ref, Scaled, Stored

TENSOR_ALIGNMENT = 64
WEIGHTS_FRAC = 0.75
"""Share of the room that experts may take as weights; the rest is for caches. Beyond it they stay quantised."""

Convert = Callable[[ExpertSource, dict[Stored, torch.Tensor]], dict[str, torch.Tensor]]
"""One expert's parts, dequantised, to its parameters, shaped as in the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A quantised expert as it was read. ``raw``: every piece of it, shaped as on disk, sharing the memory read into."""

    source: ExpertSource
    raw: dict[TensorRef, torch.Tensor]


def stays_as_read(source: ExpertSource) -> bool:
    """Whether an expert's bytes are read into its slot and left there as they are."""
    return source.is_direct or (source.is_quantised and source.stays_packed)


def unpacked_if_it_fits(layout: CheckpointLayout, room_bytes: int) -> CheckpointLayout:
    """Quantised experts made weights once, on arrival, where memory holds all of them so; else kept as they were read."""
    weights = sum(converted_nbytes(source) for row in layout.experts_LE for source in row)
    return layout.unpacked() if weights <= WEIGHTS_FRAC * room_bytes else layout


def slot_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes a slot needs so that every expert fits."""
    return max(
        plan_reads(source.parts).nbytes if stays_as_read(source) else converted_nbytes(source)
        for row in sources_LE
        for source in row
    )


def scratch_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes, besides the slots, in which a packed expert becomes weights; 0 where there is none."""
    packed = (source for row in sources_LE for source in row if stays_as_read(source) and not source.is_direct)
    return max(map(converted_nbytes, packed), default=0)


def staging_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]], under_way: int) -> int:
    """Bytes, besides the slots, of ``under_way`` experts that are read to be converted, one at a time; 0 where none is."""
    sources = [source for row in sources_LE for source in row if not stays_as_read(source)]
    return max(
        (under_way * plan_reads(source.parts).nbytes + 2 * converted_nbytes(source) for source in sources), default=0
    )


def int4_scratch_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes, besides the slots, of the 4-bit matrix that is made bf16 where it meets many rows; 0 where there is none."""
    matrices = (matrix for row in sources_LE for source in row for matrix in source.int4.values())
    return max((2 * math.prod(padded_shape(matrix.outputs, matrix.inputs)) for matrix in matrices), default=0)


def converted_nbytes(source: ExpertSource) -> int:
    """Bytes of an expert's parameters in memory, each padded to ``TENSOR_ALIGNMENT``."""
    return sum(_padded(shape.numel() * source.dtype.itemsize) for shape in map(torch.Size, source.shapes.values()))


def converter_for(model: Any) -> Convert:
    """Binds transformers' conversions to the model they belong to."""

    @torch.inference_mode()
    def convert(source: ExpertSource, raw: dict[Stored, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert_expert(source, raw, model, model.config)

    return convert


def weights_in_slot(
    arena: Arena, slot: int, source: ExpertSource, plan: ReadPlan, staging: Arena | None, convert: Convert
) -> Weights | Packed:
    """The expert whose bytes were read into ``staging``, or into the slot itself where that is None."""
    if source.int4:
        return {param: _int4_weight(arena, slot, matrix, plan) for param, matrix in source.int4.items()}
    if source.is_direct:
        return {recipe.param: _views(arena, slot, recipe.parts, plan, source.dtype) for recipe in source.recipes}
    area, place_in = (arena, slot) if staging is None else (staging, 0)
    pieces = {
        part: as_tensor(area.bytes_of(place_in, plan.slot_offsets[part], part.nbytes), part) for part in source.parts
    }
    if source.is_quantised:
        packed = Packed(source=source, raw=pieces)
        return packed if staging is None else unpack(packed, arena, slot)
    raw = {part: _part(part, pieces, source.dtype) for recipe in source.recipes for part in recipe.parts}
    weights: Weights = {}
    offset = 0
    for param, tensor in convert(source, raw).items():
        place = arena.bytes_of(slot, offset, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        weights[param] = (place,)
        offset += _padded(tensor.nbytes)
    return weights


def check_bytes(arena: Arena, slot: int, source: ExpertSource, plan: ReadPlan) -> None:
    """Raises ReadError when what was read into the slot is not what ``source.crc32`` says was written."""
    first = min(plan.slot_offsets.values())
    end = max(offset + part.nbytes for part, offset in plan.slot_offsets.items())
    if zlib.crc32(arena.view_of(slot, first, end - first)) != source.crc32:
        file = source.parts[0].file
        raise ReadError(
            f"{file} is damaged: expert {source.expert} of {source.module} does not match its checksum; remove "
            f"{file.parent}, and it is made again"
        )


def _int4_weight(arena: Arena, slot: int, matrix: Int4Ref, plan: ReadPlan) -> Int4Weight:
    packed, scale_zero, *bias = (
        as_tensor(arena.bytes_of(slot, plan.slot_offsets[ref], ref.nbytes), ref) for ref in matrix.refs
    )
    return Int4Weight(
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        packed_NK=packed,
        scale_zero_GN2=scale_zero,
        bias_N=bias[0] if bias else None,
    )


def unpack(packed: Packed, arena: Arena, slot: int) -> Weights:
    """Makes a quantised expert's weights in a slot."""
    weights: Weights = {}
    dtype, offset = packed.source.dtype, 0
    for recipe in packed.source.recipes:
        shapes = [rows_shape(part) if isinstance(part, Scaled) else part.shape for part in recipe.parts]
        rows = [shape[0] for shape in shapes]
        nbytes = sum(rows) * math.prod(shapes[0][1:]) * dtype.itemsize
        whole = arena.bytes_of(slot, offset, nbytes).view(dtype).view(sum(rows), *shapes[0][1:])
        for part, place in zip(recipe.parts, torch.split(whole, rows), strict=True):
            _fill(place, part, packed.raw)
        is_transposed = any(isinstance(part, Scaled) and part.is_transposed for part in recipe.parts)
        assert not is_transposed or len(rows) == 1, "rows of transposed parts do not lie one below the other"
        weights[recipe.param] = (whole.t() if is_transposed else whole,)
        offset += _padded(nbytes)
    return weights


def _fill(place: torch.Tensor, part: Stored, raw: dict[TensorRef, torch.Tensor]) -> None:
    if isinstance(part, Scaled):
        dequantise_into(place, part, raw[part.values], raw[part.scales])
    else:
        place.copy_(raw[part])


def _part(part: Stored, pieces: dict[TensorRef, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    if isinstance(part, Scaled):
        return dequantised(part, pieces[part.values], pieces[part.scales], dtype)
    return pieces[part]


def _views(
    arena: Arena, slot: int, parts: Sequence[Stored], plan: ReadPlan, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """A parameter's parts as tensors over the slot; parts that touch become one."""
    groups: list[list[TensorRef]] = []
    for part in parts:
        assert isinstance(part, TensorRef), "quantised bytes are no weights"
        if groups and plan.slot_offsets[groups[-1][-1]] + groups[-1][-1].nbytes == plan.slot_offsets[part]:
            groups[-1].append(part)
        else:
            groups.append([part])
    views = []
    for group in groups:
        flat = arena.bytes_of(slot, plan.slot_offsets[group[0]], sum(part.nbytes for part in group))
        rows = sum(part.shape[0] for part in group)
        views.append(flat.view(dtype).view(rows, *group[0].shape[1:]))
    return tuple(views)


def _padded(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
