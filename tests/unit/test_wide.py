"""bf16 products in fp32: the same numbers, rounded less often, and only where they are faster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from poise.model import experts, wide
from poise.model.experts import expert_forward, padded_rows
from poise.model.wide import WIDE_ROWS, is_wide, wide_linear, widen_linears
from poise.plan.memory import WIDE_BLOCK_BYTES

BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["pays", "does not pay"])
def pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of processor, whichever this one is."""
    monkeypatch.setattr(wide, "widening_pays", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    "shape", [(5, 3), (64, 100), (3, 1 + WIDE_BLOCK_BYTES // 4), (1 + WIDE_BLOCK_BYTES // 400, 100)]
)
def test_a_wide_product_is_the_fp32_product(shape: tuple[int, int]) -> None:
    rows, weight = torch.randn(7, shape[1]), torch.randn(shape).to(BF16)
    _assert_near(wide_linear(rows, weight), rows @ weight.float().t())
    other = torch.randn(shape[1], shape[0]).to(BF16)
    _assert_near(wide_linear(rows, other.t()), rows @ other.float())


def test_only_many_bf16_rows_on_a_processor_are_wide(pays: bool) -> None:
    cpu = torch.device("cpu")
    assert is_wide(WIDE_ROWS, BF16, cpu) == pays
    assert not is_wide(WIDE_ROWS - 1, BF16, cpu)
    assert not is_wide(WIDE_ROWS, torch.float32, cpu)
    assert not is_wide(WIDE_ROWS, BF16, torch.device("meta"))


def test_linear_layers_stay_within_a_rounding_of_bf16(pays: bool) -> None:
    model = nn.Sequential(nn.Linear(96, 200), nn.SiLU(), nn.Linear(200, 40, bias=False)).to(BF16)
    rows = torch.randn(2, 50, 96).to(BF16)
    with torch.inference_mode():
        exact = model.float()(rows.float())
        model.to(BF16)
        widen_linears(model)
        result = model(rows)
    assert result.dtype == BF16
    assert result.shape == (2, 50, 40)
    assert (result.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_expert_is_within_a_rounding_of_bf16(pays: bool, transposed: bool, parts: int, has_bias: bool) -> None:
    hidden, inner, rows = 64, 48, WIDE_ROWS + 3
    gate_up, down = torch.randn(2 * inner, hidden).to(BF16), torch.randn(hidden, inner).to(BF16)
    module = SimpleNamespace(
        has_gate=True,
        has_bias=has_bias,
        is_transposed=transposed,
        _apply_gate=lambda x: nn.functional.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
    )
    laid = (lambda w: w.t().contiguous()) if transposed else (lambda w: w)
    split = (laid(gate_up),) if parts == 1 or transposed else tuple(gate_up.chunk(2))
    weights = {"gate_up_proj": split, "down_proj": (laid(down),)}
    if has_bias:
        weights |= {
            "gate_up_proj_bias": (torch.randn(2 * inner).to(BF16),),
            "down_proj_bias": (torch.randn(hidden).to(BF16),),
        }
    hidden_TH, routing_T1 = torch.randn(rows, hidden).to(BF16), torch.rand(rows, 1).to(BF16)
    in_fp32 = {name: tuple(part.float() for part in matrix) for name, matrix in weights.items()}
    exact = expert_forward(module, hidden_TH.float(), in_fp32, routing_T1.float())
    result = expert_forward(module, hidden_TH, weights, routing_T1)
    assert result.dtype == BF16
    assert (result.float() - exact).abs().max() < 0.02 * exact.abs().max()
    assert padded_rows(rows, BF16, weights) == (rows if pays else 64)


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wide.widening_pays.cache_clear()
    first = wide.widening_pays()
    monkeypatch.setattr(wide, "_best_s", lambda *runs: pytest.fail("measured again"))
    assert wide.widening_pays() is first
    assert experts.is_wide(WIDE_ROWS, BF16, torch.device("cpu")) == first


def _assert_near(result: torch.Tensor, exact: torch.Tensor) -> None:
    assert (result - exact).abs().max() < 1e-5 * exact.abs().max()
