"""From quantised bytes to weights. MXFP4: a table of what each byte can mean; fp8: its bits put where fp32 has them.

The results are those of transformers' own dequantisation, bit for bit, at seven (fp8) to thirty (MXFP4) times its speed on
a CPU: it works through tiles that stay in the cache and leaves out torch's conversions, which go element by element. Where
transformers has no result (blocks that do not divide a matrix) the format's definition holds. Reads no files.
"""

from __future__ import annotations

import functools

import torch

from poise.model.scaled import MXFP4_GROUP, Scaled

TILE_WEIGHTS = 1 << 18
"""Weights that are worked on at once: with their indices and products they fit a core's second-level cache."""
FP8_SHIFT, FP8_MASK = 120, -0x78100000
"""fp32's exponent counts from 127, F8_E4M3's from 7; the sign, the last four bits of an exponent, three of a fraction."""
FP8_MAX_SCALE = 2.0**7
_E2M1_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
"""Doubled, and the scales halved, so that every scale byte is a finite power of two."""


def dequantised(scaled: Scaled, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A quantised tensor's weights in memory of their own, of shape ``scaled.shape``. Values and scales shaped as on disk."""
    out = torch.empty(rows_shape(scaled), dtype=dtype)
    dequantise_into(out, scaled, values, scales)
    return out.transpose(-1, -2) if scaled.is_transposed else out


def rows_shape(scaled: Scaled) -> tuple[int, ...]:
    """The shape of the weights as their rows lie on disk: the tensor's, or its transpose's."""
    *stack, rows, columns = scaled.shape
    return (*stack, columns, rows) if scaled.is_transposed else scaled.shape


def dequantise_into(out: torch.Tensor, scaled: Scaled, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes the weights, rows as on disk, to ``out`` of shape ``rows_shape(scaled)``: contiguous, bf16, fp16 or fp32."""
    assert out.is_contiguous(), "weights are written row after row"
    assert out.shape == rows_shape(scaled), f"{scaled.name} does not fit into {list(out.shape)}"
    one = _fp8_matrix if scaled.method == "fp8" else _mxfp4_matrix
    matrices = out.view(-1, *out.shape[-2:])
    values, scales = (
        values.reshape(len(matrices), *values.shape[-_rank(scaled) :]),
        scales.reshape(len(matrices), *scales.shape[-2:]),
    )
    for place, matrix in enumerate(matrices):
        one(matrix, values[place], scales[place], scaled.block)


def _rank(scaled: Scaled) -> int:
    """Dimensions of one matrix's values on disk."""
    return 2 if scaled.method == "fp8" else 3


def _fp8_matrix(out: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
    """Shapes: out and values (R, C), scales one per block. The product is fp32, rounded once.

    F8_E4M3's sign, exponent and fraction, moved to where fp32 has them, are the number times 2 ** -120, also where it is zero
    or subnormal. The scale makes up for it, so it must leave room for that; and NaN would become 480.
    """
    rows, columns = out.shape
    tile_rows = max(1, min(block[0], TILE_WEIGHTS // columns))
    buffer = torch.empty(tile_rows, columns, dtype=torch.int32)
    for block_row, scale in enumerate(scales.float()):
        scale_C = scale.repeat_interleave(block[1])[:columns]
        raised_C, has_room = scale_C * 2.0**FP8_SHIFT, bool(scale.abs().max() < FP8_MAX_SCALE)
        end = min(rows, (block_row + 1) * block[0])
        for begin in range(block_row * block[0], end, tile_rows):
            tile = values[begin : min(begin + tile_rows, end)]
            if has_room and not _has_nan(tile):
                bits = buffer[: len(tile)].copy_(tile.view(torch.int8))
                number = bits.bitwise_left_shift_(20).bitwise_and_(FP8_MASK).view(torch.float32)
                out[begin : begin + len(tile)] = number.mul_(raised_C)
            else:
                out[begin : begin + len(tile)] = tile.float() * scale_C


def _has_nan(tile: torch.Tensor) -> bool:
    """Whether F8_E4M3 holds NaN: the largest byte, signed or not."""
    return bool(tile.view(torch.int8).max() == 127) or bool(tile.view(torch.uint8).max() == 255)


def _mxfp4_matrix(out: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
    """Shapes: out (R, C), values (R, C / 32, 16), scales (R, C / 32). Every product is exact but for overflow."""
    rows, columns = out.shape
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    table, powers = _mxfp4_pairs(dtype), _powers_of_two(dtype)
    tile_rows = max(1, TILE_WEIGHTS // columns)
    for begin in range(0, rows, tile_rows):
        index = values[begin : begin + tile_rows].reshape(-1).int()
        tile = torch.index_select(table, 0, index).view(dtype).view(-1, MXFP4_GROUP)
        scale = torch.index_select(powers, 0, scales[begin : begin + tile_rows].reshape(-1).int())
        target = out[begin : begin + tile_rows].view(-1, MXFP4_GROUP)
        if dtype == out.dtype:
            torch.mul(tile, scale[:, None], out=target)
        else:
            target.copy_(tile * scale[:, None])


@functools.cache
def _mxfp4_pairs(dtype: torch.dtype) -> torch.Tensor:
    """Every byte of MXFP4 as twice the two numbers it holds, low half first, in one integer; shape (256,)."""
    byte, number = torch.arange(256), torch.tensor(_E2M1_DOUBLED, dtype=dtype)
    pairs = torch.stack([number[byte & 15], number[byte >> 4]], dim=1)
    return pairs.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)


@functools.cache
def _powers_of_two(dtype: torch.dtype) -> torch.Tensor:
    """Half of what a scale byte of MXFP4 means, shape (256,)."""
    return torch.exp2(torch.arange(256).float() - 128).to(dtype)
