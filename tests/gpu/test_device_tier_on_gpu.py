"""Experts copied to a GPU out of pinned memory while it computes: logits against plain transformers, memory against its budget.

Experts of some MB with few slots on the device, so that a copy that overtakes the compute that needs its slot, or the other way
round, changes logits. fp32 to 1e-5 without TF32. bf16 to 5 % of the largest logit in the median prompt, as rounding may turn a
router's choice; but to the last bit what the engine itself gives where no expert ever moves.
"""

from __future__ import annotations

import statistics
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.plan.schedule import Policy
from poise.report.bubbles import time_shares
from poise.spec.timeline import COPY, Timeline
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.device_cases import LENGTHS, Interrupts, error, open_tiers, run, smallest_device, supplier_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
LARGE = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_hidden_layers": 4}
"""Qwen3-MoE with experts of 12.6 MB in fp32: a copy takes a quarter of a millisecond, an expert's compute less."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))


@pytest.fixture
def on_gpu(reference: Reference) -> Any:
    """``on_gpu(path)``: plain transformers' model on the GPU; it goes back to the CPU after the test."""
    moved = []

    def build(path: Path) -> Any:
        moved.append(reference(path).to("cuda"))
        return moved[-1]

    yield build
    for model in moved:
        model.to("cpu")
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("dtype", "slots", "host_slots"),
    [("float32", 1, None), ("float32", 5, 3), ("bfloat16", 2, None), ("bfloat16", 3, 4)],
)
def test_large_experts(
    dtype: str,
    slots: int,
    host_slots: int | None,
    checkpoint: MakeCheckpoint,
    on_gpu: Any,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint("qwen3_moe", dtype, **LARGE)
    model, prompts = on_gpu(path), draw_prompts(LENGTHS)
    with open_tiers(path, None, None, "cuda") as resident:
        still = run(resident, prompts)
    with open_tiers(path, slots, host_slots, "cuda") as llm:
        assert supplier_of(llm).host._pinned is not None
        assert supplier_of(llm).host._pinned.is_pinned
        for _ in range(2):
            errors = []
            for ids, (new_ids, logits_TV), (want_ids, want_TV) in zip(prompts, run(llm, prompts), still, strict=True):
                errors.append(error(model, ids, new_ids, logits_TV.float()))
                assert new_ids == want_ids
                torch.testing.assert_close(logits_TV, want_TV, rtol=0, atol=0)
            print(f"{dtype}, slots {slots}, {host_slots}: errors {errors}")
            assert (max(errors) if dtype == "float32" else statistics.median(errors)) <= TOLERANCE[dtype]
        copied = llm._open().counters.bytes_read
    assert copied > 2 * llm.spec.experts_bytes


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "qwen3_next"])
def test_architectures(architecture: str, checkpoint: MakeCheckpoint, on_gpu: Any, draw_prompts: DrawPrompts) -> None:
    """Gate and up apart; biased and transposed; fused; a shared expert; recurrent layers, which sum in chunks of their own."""
    path = checkpoint(architecture)
    model, prompts = on_gpu(path), draw_prompts(LENGTHS)
    with open_tiers(path, 2, 3, "cuda") as llm:
        for ids, (new_ids, logits_TV) in zip(prompts, run(llm, prompts), strict=True):
            assert error(model, ids, new_ids, logits_TV) <= (1e-4 if architecture == "qwen3_next" else 1e-5)


@pytest.mark.parametrize("policy", [Policy(read_ahead="layer", order="index"), Policy(read_ahead="hot", ahead=2)])
def test_every_policy_gives_the_same_tokens(
    policy: Policy, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    path, prompts = checkpoint("qwen3_moe", **LARGE), draw_prompts(LENGTHS)
    with open_tiers(path, 5, None, "cuda", policy=policy) as llm:
        got = [ids for ids, _ in run(llm, prompts)]
    with open_tiers(path, None, None, "cuda") as resident:
        assert got == [ids for ids, _ in run(resident, prompts)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_in_dram(dtype: str, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, monkeypatch: Any) -> None:
    """To the last bit what comes where caches stay on the device; twice, in memory that the first call gave back."""
    path, prompts = checkpoint("qwen3_moe", dtype, **LARGE), draw_prompts(LENGTHS)
    with open_tiers(path, 3, None, "cuda", kv_on_disk=False) as resident:
        still = run(resident, prompts)
    monkeypatch.setattr("poise.engine.device_tier.DeviceTier.may_move_cache", lambda *_: (True,))
    with open_tiers(path, 3, None, "cuda") as llm:
        for _ in range(2):
            for (new_ids, logits_TV), (want_ids, want_TV) in zip(run(llm, prompts), still, strict=True):
                assert new_ids == want_ids
                torch.testing.assert_close(logits_TV, want_TV, rtol=0, atol=0)
        assert llm.runner.kv is not None
        assert llm.runner.kv.counters.bytes_read > 0


def test_the_device_holds_no_more_than_its_budget(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    """In the smallest budget that a refusal names, and in one of 400 MB, whose slots are given back when the model closes."""
    path, prompts = checkpoint("qwen3_moe", **LARGE), draw_prompts((40,) * 16)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    for budget in (smallest_device(path, asked[0], params, "cuda"), 400 * 10**6):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with LLM(path, memory="4GiB", device="cuda", device_memory=budget) as llm:
            llm.generate(asked if budget > 300 * 10**6 else asked[:1], params)
            slots = llm._open().num_slots
        peak = torch.cuda.max_memory_allocated() - before
        print(f"budget {budget / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, {slots} slots")
        assert peak <= budget
    assert slots > 1


def test_an_interrupted_call_leaves_nothing_behind(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    path, prompts = checkpoint("qwen3_moe", **LARGE), draw_prompts(LENGTHS)
    with open_tiers(path, 2, 3, "cuda") as llm:
        want = [ids for ids, _ in run(llm, prompts)]
        interrupts = Interrupts()
        llm.runner.listen(interrupts)
        with pytest.raises(KeyboardInterrupt):
            run(llm, prompts)
        llm.runner.listen(interrupts, on=False)
        assert [ids for ids, _ in run(llm, prompts)] == want
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")]


def test_the_timeline_shows_copies(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    path, prompts = checkpoint("qwen3_moe", **LARGE), draw_prompts(LENGTHS)
    timeline = Timeline()
    with open_tiers(path, 2, None, "cuda") as llm:
        run(llm, prompts, timeline=timeline)
    copies = [span for span in timeline.spans if span.track == COPY and "bytes" in span.detail]
    assert copies
    assert time_shares(timeline.spans).elapsed_s > 0
