"""An expert's weights in a slot on a device: the same tensors as in DRAM, one behind the other, each where products are fast.

Matrix products on a GPU want memory that begins on a multiple of 16 bytes, which safetensors does not promise: bytes are laid
out anew instead of as they lie on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from poise.model.int4 import Int4Weight
from poise.model.layout import ExpertSource, Weights

TENSOR_ALIGNMENT = 256


def device_slot_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes that a slot on a device needs so that every expert fits."""
    return max(_slot_bytes(source) for row in sources_LE for source in row)


def weights_nbytes(source: ExpertSource) -> int:
    """Bytes of an expert's weights: what is copied for it."""
    return sum(math.prod(shape) for shape in source.shapes.values()) * source.dtype.itemsize


def laid_out_on_device(
    weights: Weights, slot_B: torch.Tensor
) -> tuple[Weights, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The tensors in the slot, and what is copied for them: (to, from), both uint8 of shape (bytes,).

    ``weights``: in DRAM, none of them in 4 bits; each is dense, rows or columns first.
    """
    placed: Weights = {}
    copies = []
    offset = 0
    for name, parts in weights.items():
        assert not isinstance(parts, Int4Weight), "4-bit weights are multiplied on the CPU"
        there = []
        for part in parts:
            into_B = slot_B[offset : offset + part.nbytes]
            flat = torch.as_strided(part, (part.numel(),), (1,))
            there.append(torch.as_strided(into_B.view(part.dtype), part.shape, part.stride()))
            copies.append((into_B, flat.view(torch.uint8)))
            offset += _padded(part.nbytes)
        placed[name] = tuple(there)
    return placed, copies


def _slot_bytes(source: ExpertSource) -> int:
    if source.is_direct:
        return sum(_padded(part.nbytes) for part in source.parts)
    return sum(_padded(math.prod(shape) * source.dtype.itemsize) for shape in source.shapes.values())


def _padded(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
