"""``dtype="auto"``: the checkpoint's own unless this device is far slower at it, never lower than fp32, always said."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from poise import LLM
from poise.engine.dtype import choose_for_device, measured_rate
from tests.conftest import MakeCheckpoint

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RATES: Mapping[str, Mapping[torch.dtype, float]] = {
    "AVX-512 with bf16": {FP32: 74, BF16: 184, FP16: 10},
    "AVX2": {FP32: 77, BF16: 22, FP16: 13},
    "fp16 in hardware": {FP32: 80, BF16: 300, FP16: 290},
    "no bf16 worth the name": {FP32: 80, BF16: 2, FP16: 1},
}


@pytest.mark.parametrize(
    ("machine", "own", "chosen"),
    [
        ("AVX-512 with bf16", FP32, FP32),
        ("AVX-512 with bf16", BF16, BF16),
        ("AVX-512 with bf16", FP16, BF16),
        ("AVX2", BF16, BF16),
        ("AVX2", FP16, FP16),
        ("fp16 in hardware", FP16, FP16),
        ("no bf16 worth the name", BF16, FP32),
        ("no bf16 worth the name", FP32, FP32),
    ],
)
@pytest.mark.parametrize("noise", [0.8, 1.0, 1.25])
def test_the_choice_is_the_same_on_a_busy_machine(
    machine: str, own: torch.dtype, chosen: torch.dtype, noise: float
) -> None:
    rates = RATES[machine]
    found = choose_for_device(own, is_asked_for=False, rate=lambda dtype: rates[dtype] * (noise if dtype == own else 1))
    assert found.dtype == chosen
    assert f"checkpoint is {str(own).removeprefix('torch.')}" in found.reason
    assert ("times slower" in found.reason) == (own != chosen)


@pytest.mark.parametrize("own", [FP32, BF16, FP16])
def test_what_was_asked_for_is_taken_without_measuring(own: torch.dtype) -> None:
    found = choose_for_device(own, is_asked_for=True, rate=lambda _: pytest.fail("measured"))
    assert (found.dtype, found.reason) == (own, "as asked for")


def test_rates_are_measured_in_multiply_adds() -> None:
    assert 1e8 < measured_rate(FP32) < 1e14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_choice_and_its_reason_are_in_the_description(dtype: str, checkpoint: MakeCheckpoint) -> None:
    with LLM(checkpoint("qwen3_moe", dtype), memory="1GiB") as llm:
        facts = llm.describe()
        assert f"checkpoint is {dtype}" in str(facts["dtype_reason"])
        assert all(str(weight.dtype) == f"torch.{facts['dtype']}" for weight in llm._blueprint.model.parameters())
