"""From the bytes in a slot to the weights an expert computes with.

Where the bytes on disk are the weights, tensors are laid over the slot and nothing is copied. Otherwise (another dtype, a
layout that transformers converts) the bytes were read into a staging area and the converted tensors go into the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from poise.model.checkpoint import TensorRef
from poise.model.dense import as_tensor
from poise.model.layout import ExpertSource, Weights, convert_expert
from poise.offload.arena import Arena
from poise.offload.read_plan import ReadPlan, plan_reads

TENSOR_ALIGNMENT = 64

Convert = Callable[[ExpertSource, dict[TensorRef, torch.Tensor]], dict[str, torch.Tensor]]
"""One expert's parts, shaped as on disk, to its parameters, shaped as in the model."""


def slot_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes a slot needs so that every expert fits."""
    return max(
        plan_reads(source.parts).nbytes if source.is_direct else converted_nbytes(source)
        for row in sources_LE
        for source in row
    )


def converted_nbytes(source: ExpertSource) -> int:
    """Bytes of an expert's parameters in memory, each padded to ``TENSOR_ALIGNMENT``."""
    return sum(_padded(shape.numel() * source.dtype.itemsize) for shape in map(torch.Size, source.shapes.values()))


def converter_for(model: Any) -> Convert:
    """Binds transformers' conversions to the model they belong to."""

    @torch.inference_mode()
    def convert(source: ExpertSource, raw: dict[TensorRef, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert_expert(source, raw, model, model.config)

    return convert


def weights_in_slot(
    arena: Arena, slot: int, source: ExpertSource, plan: ReadPlan, staging: Arena | None, convert: Convert
) -> Weights:
    """The expert whose bytes were read into ``staging``, or into the slot itself where that is None."""
    if staging is None:
        return {recipe.param: _views(arena, slot, recipe.parts, plan, source.dtype) for recipe in source.recipes}
    raw = {part: as_tensor(staging.bytes_of(0, plan.slot_offsets[part], part.nbytes), part) for part in source.parts}
    weights: Weights = {}
    offset = 0
    for param, tensor in convert(source, raw).items():
        place = arena.bytes_of(slot, offset, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        weights[param] = (place,)
        offset += _padded(tensor.nbytes)
    return weights


def _views(
    arena: Arena, slot: int, parts: Sequence[TensorRef], plan: ReadPlan, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """A parameter's parts as tensors over the slot; parts that touch become one."""
    groups: list[list[TensorRef]] = []
    for part in parts:
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
