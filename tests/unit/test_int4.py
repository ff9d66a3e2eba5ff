"""4-bit matrices against the definition: a naive rounding, a naive product, padding in both directions."""

from __future__ import annotations

import pytest
import torch

from poise.model import int4
from poise.model.int4 import GROUP, Int4Weight, int4_linear, is_made_bf16, padded_shape, quantise
from tests.int4_reference import as_matrix

SHAPES = [(16, 64), (64, 64), (80, 192), (192, 40), (13, 7), (130, 129), (256, 320)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_rounded_matrix_is_near_and_the_stated_error_is_its_error(outputs: int, inputs: int) -> None:
    weight_NK = draw(outputs, inputs)
    rounded = quantise(weight_NK)
    error = relative(as_matrix(rounded.weight), weight_NK)
    assert error == pytest.approx((rounded.squared_error / rounded.squared_norm) ** 0.5, rel=1e-4)
    assert error < 0.1
    assert error < relative(rounded_to_nearest(weight_NK), weight_NK), "better than the plain way"


def rounded_to_nearest(weight_NK: torch.Tensor) -> torch.Tensor:
    """The span of each group's weights cut into 15 steps."""
    groups = []
    for group in weight_NK.split(GROUP, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / 15
        groups.append(((group - low) / step.clamp(min=1e-9)).round() * step + low)
    return torch.cat(groups, dim=1)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 5, int4.DEQUANTISE_ROWS + 3])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_product_is_that_with_the_rounded_matrix(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> None:
    weight = quantise(draw(outputs, inputs), draw(outputs, seed=1)).weight
    assert weight.bias_N is not None
    rows_TK = draw(rows, inputs, seed=2).to(dtype)
    wanted = rows_TK.double() @ as_matrix(weight).double().t() + weight.bias_N[:outputs].double()
    found = int4_linear(rows_TK, weight)
    assert found.dtype == dtype
    assert found.shape == (rows, outputs)
    assert relative(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("outputs", [64, 320])
def test_many_rows_and_few_see_the_same_matrix(outputs: int) -> None:
    """From ``DEQUANTISE_ROWS`` on another product computes; the difference is bf16's rounding, nothing of the padding."""
    weight = quantise(draw(outputs, 200)).weight
    rows_TK = draw(int4.DEQUANTISE_ROWS, 200, seed=1).bfloat16()
    assert not is_made_bf16(len(rows_TK) - 1, rows_TK.dtype, weight)
    assert not is_made_bf16(len(rows_TK), torch.float32, weight)
    many, few = int4_linear(rows_TK, weight), int4_linear(rows_TK[:-1], weight)
    assert relative(many[:-1], few) < TOLERANCE[torch.bfloat16]


def test_a_transposed_matrix_rounds_like_its_copy() -> None:
    weight_KN = draw(192, 80)
    assert torch.equal(
        as_matrix(quantise(weight_KN.t()).weight), as_matrix(quantise(weight_KN.t().contiguous()).weight)
    )


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0])
def test_a_constant_matrix_is_held_as_well_as_bf16_holds_it(value: float) -> None:
    matrix = as_matrix(quantise(torch.full((16, 64), value)).weight)
    assert torch.allclose(matrix, torch.full((16, 64), value).bfloat16().float())


def test_one_outlier_spoils_its_own_group_only() -> None:
    weight_NK = draw(16, 256)
    spoiled_NK = weight_NK.clone()
    spoiled_NK[3, 70] = 500.0
    plain, spoiled = as_matrix(quantise(weight_NK).weight), as_matrix(quantise(spoiled_NK).weight)
    differs_NK = plain != spoiled
    assert differs_NK[3, 64:128].any()
    differs_NK[3, 64:128] = False
    assert not differs_NK.any()


def test_matrices_take_4_and_a_half_bits_a_weight() -> None:
    weight = quantise(draw(256, 512)).weight
    assert (weight.packed_NK.nbytes + weight.scale_zero_GN2.nbytes) * 8 == 4.5 * 256 * 512
    assert padded_shape(80, 40) == (80, 64)
    assert padded_shape(64, 64) == (64, 64)


def test_a_matrix_that_is_not_finite_says_so() -> None:
    weight_NK = draw(16, 64)
    weight_NK[1, 2] = float("nan")
    assert quantise(weight_NK).squared_error != quantise(weight_NK).squared_error
    assert isinstance(quantise(weight_NK).weight, Int4Weight)
