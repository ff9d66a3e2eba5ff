"""What a plan says that passes take of a device, against the tensors that live while they run, counted one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.engine.runner import ForwardInputs
from poise.units import MIB
from tests.conftest import MakeCheckpoint
from tests.live_memory import LiveMemory

VOCABULARY = 2048
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
    },
    "qwen3_moe": {
        "hidden_size": 256,
        "moe_intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 8,
    },
}
"""A sixteenth of Mixtral's widths; Qwen3-MoE's proportions, whose heads together are wider than the hidden state."""
PROMPTS = (
    (16, 2, 64, 128, 2048, False),
    (8, 4, 128, 128, 4096, False),
    (8, 2, 128, 128, 1024, True),
    (64, 2, 1, 1, 128, False),
)
"""Batch size, batches, tokens of each prompt in a pass, its length, prompt tokens in a pass, whether lengths differ: prompts in
chunks, whole, padded, and next to nothing but decoding."""


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize(("size", "batches", "chunk", "length", "cap", "is_ragged"), PROMPTS)
def test_passes_take_what_is_planned_and_not_much_less(
    architecture: str,
    size: int,
    batches: int,
    chunk: int,
    length: int,
    cap: int,
    is_ragged: bool,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("poise.model.wide.widening_pays", lambda: False)
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (chunk,))
    path = checkpoint(architecture, "bfloat16", vocab_size=VOCABULARY, **SHAPES[architecture])
    generator = torch.Generator().manual_seed(0)
    lengths = [length - (index % 5 if is_ragged else 0) for index in range(size * batches)]
    prompts = [torch.randint(3, VOCABULARY, (each,), generator=generator).tolist() for each in lengths]
    groups = [(size, batches)]
    with LLM(path, memory="2GiB", device="cpu", device_memory="1GiB", expert_slots=2, groups=groups) as llm:
        drawn = llm._blueprint
        llm._blueprint = replace(drawn, pipeline=replace(drawn.pipeline, pass_tokens=(cap,)))
        peaks = _measured(llm, monkeypatch)
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        planned = llm.describe()["activation_bytes"]
        assert llm.describe()["chunk_tokens"] == chunk
    assert isinstance(planned, int)
    print(
        f"{architecture}, {size} x {batches}, chunk {chunk}: peak {max(peaks) / 1e6:.2f} MB, planned {planned / 1e6:.2f}"
    )
    assert max(peaks) <= planned <= 1.6 * max(peaks) + 2 * MIB


def _measured(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The peaks of the passes to come."""
    peaks: list[int] = []
    run = llm.runner.run

    def measured(group: Sequence[ForwardInputs]) -> list[torch.Tensor]:
        with LiveMemory() as memory:
            results = run(group)
        peaks.append(memory.peak_bytes)
        return results

    monkeypatch.setattr(llm.runner, "run", measured)
    return peaks
