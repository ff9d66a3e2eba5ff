"""4-bit matrices: torch's own packed format and CPU kernel, groups of 64 inputs; rounding, and the product with them.

A weight is (q - 8) * scale + zero with q from 0 to 15; scale and zero are bf16, one pair per group and output: 4.5 bits a
weight. Matrices are padded to what the kernel takes, and rows with zeros. The order of the packed bytes is the kernel's own
and differs between processors (``kernel_layout``). No calibration data; no file is read or written here.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import torch

GROUP = 64
LEVELS = 15
OUTPUT_MULTIPLE = 16
"""The kernel takes outputs in multiples of this."""
INNER_K_TILES = 2
"""The tiling that torch's interface asks for; its CPU kernel has but one."""
REFINEMENTS = 2
"""Times that scale and zero are fitted anew to the rounded values: the squared error falls by 7 %, and hardly further."""
TILE_OUTPUTS = 64
"""Outputs that are rounded, or made bf16, at once: what the kernel keeps together, and little enough for a core's cache."""
DEQUANTISE_ROWS = 160
"""Rows from which it is quicker to make the matrix bf16 first; decision 007 has the measurement."""
_LEVEL_AS_BF16, _BF16_OFFSET = 0x4300, 136
"""A level in the last bits of bf16's 128 reads 128 + q; less 136 it is q - 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Weight:
    """A matrix of ``outputs`` by ``inputs``; N and K are these, padded.

    packed_NK: (N, K / 2) uint8 in the kernel's order; scale_zero_GN2: (K / 64, N, 2) bf16; bias_N: fp32, or None.
    """

    outputs: int
    inputs: int
    packed_NK: torch.Tensor
    scale_zero_GN2: torch.Tensor
    bias_N: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """A rounded matrix, and how far it is from what it was: sums of squares over its weights."""

    weight: Int4Weight
    squared_error: float
    squared_norm: float


def padded_shape(outputs: int, inputs: int) -> tuple[int, int]:
    """(N, K) of a matrix as the kernel takes it."""
    return outputs - outputs % -OUTPUT_MULTIPLE, inputs - inputs % -GROUP


def quantise(weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Rounded:
    """Rounds a matrix of shape (outputs, inputs), any float dtype and strides, to 4 bits. A bias is kept as it is."""
    outputs, inputs = weight_NK.shape
    padded_outputs, padded_inputs = padded_shape(outputs, inputs)
    packed_NK = torch.empty(padded_outputs, padded_inputs // 2, dtype=torch.uint8)
    scale_zero_GN2 = torch.empty(padded_inputs // GROUP, padded_outputs, 2, dtype=torch.bfloat16)
    squared_error = squared_norm = 0.0
    columns_K = _padded_columns(inputs)
    for begin in range(0, padded_outputs, TILE_OUTPUTS):
        end = min(begin + TILE_OUTPUTS, padded_outputs)
        tile = weight_NK[begin:end].float()
        tile = torch.nn.functional.pad(tile[:, columns_K], (0, 0, 0, end - begin - len(tile)))
        grouped_NGC = tile.view(end - begin, -1, GROUP)
        levels, scale, zero = _fitted(grouped_NGC)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            levels.view(end - begin, -1).to(torch.int32), INNER_K_TILES
        )
        packed_NK[begin:end] = packed
        scale_zero_GN2[:, begin:end] = torch.cat([scale, zero], dim=-1).transpose(0, 1)
        error = ((levels - 8) * scale + zero - grouped_NGC).view(tile.shape)
        squared_error += float(error[:, :inputs].square().sum(dtype=torch.float64))
        squared_norm += float(tile[:, :inputs].square().sum(dtype=torch.float64))
    bias = None if bias_N is None else torch.nn.functional.pad(bias_N.float(), (0, padded_outputs - outputs))
    weight = Int4Weight(outputs=outputs, inputs=inputs, packed_NK=packed_NK, scale_zero_GN2=scale_zero_GN2, bias_N=bias)
    return Rounded(weight=weight, squared_error=squared_error, squared_norm=squared_norm)


def _padded_columns(inputs: int) -> torch.Tensor:
    """Which input stands in each place, shape (K,): the last group's are repeated, for zeros would widen what it spans."""
    place_K = torch.arange(padded_shape(0, inputs)[1])
    begin = inputs // GROUP * GROUP
    return torch.where(place_K < inputs, place_K, begin + (place_K - begin) % max(1, inputs - begin))


def _fitted(grouped_NGC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (N, G, C) from 0 to 15 as floats, scale and zero (N, G, 1) that bf16 holds exactly.

    The scale first spans each group's smallest and largest weight. Then scale and zero are the line that fits the group's
    weights to their levels with the least squares, and the weights are rounded to it again.
    """
    low, high = grouped_NGC.amin(-1, keepdim=True), grouped_NGC.amax(-1, keepdim=True)
    mean = grouped_NGC.mean(-1, keepdim=True)
    scale = _as_bf16(_positive((high - low) / LEVELS))
    zero = _as_bf16(low + scale * 8)
    levels = _levels(grouped_NGC, scale, zero)
    for _ in range(REFINEMENTS):
        level_mean = levels.mean(-1, keepdim=True)
        spread = levels - level_mean
        variance = spread.square().sum(-1, keepdim=True)
        slope = (spread * (grouped_NGC - mean)).sum(-1, keepdim=True) / _positive(variance)
        scale = _as_bf16(_positive(torch.where(variance > 0, slope, scale)))
        zero = _as_bf16(mean - scale * (level_mean - 8))
        levels = _levels(grouped_NGC, scale, zero)
    return levels, scale, zero


def _levels(grouped_NGC: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((grouped_NGC - zero) / scale + 8).round_().clamp_(0, LEVELS)


def _positive(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(min=torch.finfo(torch.float32).tiny)


def _as_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def int4_linear(rows_TK: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """rows_TK @ w^T + bias in the rows' dtype (bf16, fp16, fp32). Shapes: (T, inputs) to (T, outputs)."""
    _, inputs = padded_shape(weight.outputs, weight.inputs)
    rows = torch.nn.functional.pad(rows_TK, (0, inputs - weight.inputs)).contiguous()
    if is_made_bf16(len(rows), rows.dtype, weight):
        result_TN = torch.mm(rows, _as_bf16_matrix(weight))
    else:
        result_TN = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, weight.packed_NK, GROUP, weight.scale_zero_GN2.to(rows.dtype)
        )
    if weight.bias_N is not None:
        result_TN += weight.bias_N.to(rows.dtype)
    return result_TN[:, : weight.outputs]


def is_made_bf16(rows: int, dtype: torch.dtype, weight: Int4Weight) -> bool:
    """Whether ``int4_linear`` makes the matrix bf16 for so many rows: from there on the kernel's own pace is the slower one."""
    return (
        dtype == torch.bfloat16
        and rows >= DEQUANTISE_ROWS
        and len(weight.packed_NK) % TILE_OUTPUTS == 0
        and _halves_lie_beside()
    )


def _as_bf16_matrix(weight: Int4Weight) -> torch.Tensor:
    """The matrix transposed, (K, N) in bf16, where ``_halves_lie_beside``."""
    outputs, inputs = padded_shape(weight.outputs, weight.inputs)
    out_KN = torch.empty(inputs, outputs, dtype=torch.bfloat16)
    scale_GN, zero_GN = (part.contiguous() for part in weight.scale_zero_GN2.unbind(-1))
    half = TILE_OUTPUTS // 2
    bits = torch.empty(inputs, TILE_OUTPUTS, dtype=torch.int16)
    centred = torch.empty(inputs, TILE_OUTPUTS, dtype=torch.bfloat16)
    for block, begin in enumerate(range(0, outputs, TILE_OUTPUTS)):
        two = weight.packed_NK.view(-1, inputs, half)[block].to(torch.int16)
        torch.bitwise_and(two, LEVELS, out=bits[:, :half])
        torch.bitwise_right_shift(two, 4, out=bits[:, half:])
        torch.sub(bits.bitwise_or_(_LEVEL_AS_BF16).view(torch.bfloat16), _BF16_OFFSET, out=centred)
        columns = slice(begin, begin + TILE_OUTPUTS)
        torch.addcmul(
            zero_GN[:, None, columns],
            centred.view(-1, GROUP, TILE_OUTPUTS),
            scale_GN[:, None, columns],
            out=out_KN.view(-1, GROUP, outputs)[:, :, columns],
        )
    return out_KN


@functools.cache
def _halves_lie_beside() -> bool:
    """Whether the kernel keeps 64 outputs together, for each input 32 bytes with outputs n and n + 32 (AVX-512)."""
    levels_NK = (torch.arange(TILE_OUTPUTS * GROUP) * 7 % 16).view(TILE_OUTPUTS, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_NK.to(torch.int32), INNER_K_TILES)
    low, high = levels_NK[: TILE_OUTPUTS // 2], levels_NK[TILE_OUTPUTS // 2 :]
    return torch.equal(packed.view(GROUP, -1), (low | high << 4).t().to(torch.uint8))


def kernel_layout() -> str:
    """Names the order in which this processor's kernel has its bytes: packed weights are good where the name is the same."""
    shape = (2 * TILE_OUTPUTS + OUTPUT_MULTIPLE, 2 * GROUP)
    levels_NK = (torch.arange(shape[0] * shape[1]) * 2_654_435_761 >> 13 & 15).view(shape).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_NK, INNER_K_TILES)
    return f"{zlib.crc32(packed.numpy().tobytes()):08x}"
