"""One expert as one run of bytes: how it lies in a rank's memory, and what travels when it moves to another rank.

The order follows from the expert's description alone, so that every rank lays the same bytes out in the same way, whatever
its files look like.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from poise.model.inspect import DTYPE_OF_SAFETENSORS
from poise.model.int4 import Int4Weight
from poise.model.layout import ExpertSource, Weights
from poise.model.scaled import Int4Ref

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A tensor in the run: a whole parameter, or one of the two or three tensors of a 4-bit matrix."""

    param: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def over(self, run: torch.Tensor) -> torch.Tensor:
        """The tensor, sharing the memory of ``run`` (uint8)."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return run[self.offset : self.offset + nbytes].view(self.dtype).view(self.shape)


def pieces_of(source: ExpertSource) -> tuple[Piece, ...]:
    """An expert's tensors in their order, each aligned."""
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    if source.int4:
        for param, matrix in sorted(source.int4.items()):
            tensors += [(param, _dtype(ref.dtype), ref.shape) for ref in matrix.refs]
    else:
        tensors += [(param, source.dtype, shape) for param, shape in sorted(source.shapes.items())]
    pieces, offset = [], 0
    for param, dtype, shape in tensors:
        pieces.append(Piece(param=param, dtype=dtype, shape=tuple(shape), offset=offset))
        offset += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return tuple(pieces)


def layout_of(source: ExpertSource) -> Hashable:
    """The same for experts whose weights lie alike in their runs."""
    return pieces_of(source), tuple((param, each.outputs, each.inputs) for param, each in sorted(source.int4.items()))


def run_nbytes(source: ExpertSource) -> int:
    """Bytes of the run."""
    last = pieces_of(source)[-1]
    return last.offset + -(-math.prod(last.shape) * last.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def weights_over(run: torch.Tensor, source: ExpertSource) -> Weights:
    """The expert's weights, sharing the memory of ``run`` (uint8)."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for piece in pieces_of(source):
        tensors.setdefault(piece.param, []).append(piece.over(run))
    if not source.int4:
        return {param: tuple(parts) for param, parts in tensors.items()}
    return {param: _int4(source.int4[param], parts) for param, parts in tensors.items()}


def copy_weights(weights: Weights, run: torch.Tensor, source: ExpertSource) -> None:
    """Puts an expert's weights, wherever they lie, into the run."""
    for param, place in weights_over(run, source).items():
        given = weights[param]
        if isinstance(place, Int4Weight):
            assert isinstance(given, Int4Weight), f"{param} is a 4-bit matrix"
            place.packed_NK.copy_(given.packed_NK)
            place.scale_zero_GN2.copy_(given.scale_zero_GN2)
            if place.bias_N is not None and given.bias_N is not None:
                place.bias_N.copy_(given.bias_N)
            continue
        assert not isinstance(given, Int4Weight), f"{param} is no 4-bit matrix"
        for rows, part in zip(torch.split(place[0], [len(part) for part in given]), given, strict=True):
            rows.copy_(part)


def _int4(matrix: Int4Ref, parts: list[torch.Tensor]) -> Int4Weight:
    packed, scale_zero, *bias = parts
    return Int4Weight(
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        packed_NK=packed,
        scale_zero_GN2=scale_zero,
        bias_N=bias[0] if bias else None,
    )


def _dtype(name: str) -> torch.dtype:
    return torch.uint8 if name == "U8" else DTYPE_OF_SAFETENSORS[name]
