"""Dequantisation against transformers' own functions, bit for bit, and against the formats' definition where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from poise.model import dequantise
from poise.model.checkpoint import TensorRef
from poise.model.dequantise import dequantised
from poise.model.quantisation import Method
from poise.model.scaled import Scaled
from tests.quantised_checkpoints import from_fp8

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ANYWHERE = TensorRef(name="x", file=Path("x"), dtype="U8", shape=(), offset=0, nbytes=0)

pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")


def scaled(method: Method, shape: tuple[int, ...], block: tuple[int, int] = (1, 32)) -> Scaled:
    return Scaled(name="x", method=method, shape=shape, values=ANYWHERE, scales=ANYWHERE, block=block)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal in shape, dtype, every number and its sign; NaN where NaN."""
    numbers = [tensor.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0) for tensor in (ours, theirs)]
    return (
        (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        and torch.equal(*numbers)
        and torch.equal(ours.isnan(), theirs.isnan())
        and torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan())
    )


def all_bytes(*shape: int) -> torch.Tensor:
    """Every byte, over and over."""
    return torch.arange(torch.Size(shape).numel()).remainder(256).to(torch.uint8).view(shape)


def mxfp4_of_transformers(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return result


def fp8_of_transformers(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result: torch.Tensor = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_of_mxfp4_under_every_scale_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    blocks = all_bytes(16, 16).expand(2, 256, 16, 16)
    scales = all_bytes(256)[:, None].expand(2, 256, 16)
    ours = dequantised(scaled("mxfp4", (2, 512, 256)), blocks, scales, dtype)
    assert same_bits(ours, mxfp4_of_transformers(blocks, scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 384), (128, 128)),
        ((64, 32), (128, 128)),
        ((2, 256, 128), (128, 128)),
        ((96, 48), (16, 16)),
        ((6, 9), (2, 3)),
        ((40, 20), (1, 20)),
    ],
    ids=str,
)
def test_every_byte_of_fp8_is_what_transformers_makes_of_it(
    dtype: torch.dtype, scale_dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    values = all_bytes(*shape).view(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(0)).mul(3).to(scale_dtype)
    ours = dequantised(scaled("fp8", shape, block), values, scales, dtype)
    assert same_bits(ours, fp8_of_transformers(values, scales, dtype))


@pytest.mark.parametrize("shape", [(576, 320), (130, 2), (5, 129), (1, 7)], ids=str)
def test_blocks_at_the_ends_are_smaller_as_the_format_says(shape: tuple[int, int]) -> None:
    """DeepSeek-V3's ``kv_a_proj_with_mqa`` has 576 rows: four blocks and a half. transformers refuses or misreads these."""
    block = (128, 128)
    values = all_bytes(*shape).view(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=torch.Generator().manual_seed(0))
    ours = dequantised(scaled("fp8", shape, block), values, scales, torch.bfloat16)
    assert same_bits(ours, from_fp8(values, scales, block, torch.bfloat16))


@pytest.mark.parametrize("tile", [1, 100, 1000])
def test_the_size_of_a_tile_changes_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = all_bytes(1, 40, 3, 16), all_bytes(1, 40, 3).clamp(90, 140)
    values, grid = all_bytes(40, 96).view(torch.float8_e4m3fn), torch.rand(3, 6)
    cases = [(scaled("mxfp4", (1, 96, 40)), blocks, scales), (scaled("fp8", (40, 96), (16, 16)), values, grid)]
    before = [dequantised(*case, torch.bfloat16) for case in cases]
    monkeypatch.setattr(dequantise, "TILE_WEIGHTS", tile)
    assert all(same_bits(dequantised(*case, torch.bfloat16), want) for case, want in zip(cases, before, strict=True))


@pytest.mark.parametrize("scale", [1e-38, 2e-45, 127.0, 128.0, 1e30, float("inf"), float("nan"), -3.0, 0.0])
@pytest.mark.parametrize("with_nan", [False, True], ids=["numbers", "nan"])
def test_no_scale_is_too_small_or_too_large(scale: float, with_nan: bool) -> None:
    values = all_bytes(16, 16)
    if not with_nan:
        values = values.where((values & 127) != 127, 126)
    fp8, scales = values.view(torch.float8_e4m3fn), torch.full((1, 1), scale)
    for dtype in DTYPES:
        ours = dequantised(scaled("fp8", (16, 16), (16, 16)), fp8, scales, dtype)
        assert same_bits(ours, fp8_of_transformers(fp8, scales, dtype))


def test_values_may_lie_at_an_odd_place() -> None:
    """A slot's bytes lie where they lay on disk, and a file may begin its tensors anywhere."""
    values, scales = all_bytes(64, 64), torch.rand(1, 1)
    memory = torch.empty(values.numel() + 1, dtype=torch.uint8)
    odd = memory[1:].view(64, 64)
    odd.copy_(values)
    want = dequantised(scaled("fp8", (64, 64), (128, 128)), values.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    got = dequantised(scaled("fp8", (64, 64), (128, 128)), odd.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    assert same_bits(got, want)
