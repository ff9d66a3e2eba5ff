"""Three tiers, disk, DRAM and a small device that ordinary memory plays: logits against plain transformers, each tier forced.

Prompts of different length run in three batches of two rows, in chunks of eight, and end at different times. A device has one
or three slots, or all; DRAM all experts, or one or five. What was read and copied is counted: nothing passes by staying.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.errors import ReadError, UsageError
from poise.offload.kv_places import DramPlace
from poise.plan.schedule import Policy
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.device_cases import DEVICE_MEMORY, LENGTHS, Interrupts, error, open_tiers, run, smallest_device, supplier_of
from tests.quantised_checkpoints import write_fp8

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 4},
    "mixtral": {},
    "gpt_oss": {},
    "granitemoe": {},
    "deepseek_v3": {},
}
"""Per expert and direct; gate and up apart; biased and transposed; fused; a shared expert and layers without any."""
TIERS = ((1, None), (3, None), (None, None), (1, 1), (3, 5))
"""Slots of the device, and of DRAM; None: for all experts."""


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))


@pytest.mark.parametrize(("slots", "host_slots"), TIERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiers_change_no_logits(
    architecture: str,
    slots: int | None,
    host_slots: int | None,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint(architecture, **ARCHITECTURES[architecture])
    model, prompts = reference(path), draw_prompts(LENGTHS)
    with open_tiers(path, slots, host_slots) as llm:
        for ids, (new_ids, logits_TV) in zip(prompts, run(llm, prompts), strict=True):
            assert error(model, ids, new_ids, logits_TV) <= 1e-5
        host, copied = supplier_of(llm).host, llm._open().counters.bytes_read
        experts = sum(llm.spec.experts_L)
        assert host.num_slots == (host_slots or experts)
        if host_slots is None:
            assert host.bytes_read <= experts * llm._blueprint.pipeline.slot_bytes * 2, "DRAM reads an expert once"
        else:
            assert host.bytes_read > 2 * llm.spec.experts_bytes, "experts come from the disk again and again"
        if slots is None:
            assert copied <= llm.spec.experts_bytes, "what is on the device stays there"
        else:
            assert copied > 2 * llm.spec.experts_bytes


@pytest.mark.parametrize("policy", [Policy(read_ahead="layer", order="index"), Policy(read_ahead="hot", ahead=2)])
@pytest.mark.parametrize("host_slots", [None, 4])
def test_every_policy_gives_the_same_tokens(
    policy: Policy, host_slots: int | None, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts(LENGTHS)
    with open_tiers(path, 5, host_slots, policy=policy) as llm, LLM(path, memory="1GiB") as plain:
        assert [ids for ids, _ in run(llm, prompts)] == [ids for ids, _ in run(plain, prompts)]


@pytest.mark.parametrize("architecture", ["mixtral", "mixtral_sliding", "qwen3_next", "deepseek_v3"])
def test_caches_in_dram_change_no_logits(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain layers leave the device between attentions, windows and states stay; rows end at different times."""
    monkeypatch.setattr("poise.engine.device_tier.DeviceTier.may_move_cache", lambda *_: (True,))
    path = checkpoint(architecture)
    model, prompts = reference(path), draw_prompts(LENGTHS)
    with open_tiers(path, 3, None) as llm:
        for _ in range(2):
            for ids, (new_ids, logits_TV) in zip(prompts, run(llm, prompts), strict=True):
                assert error(model, ids, new_ids, logits_TV) <= (1e-4 if architecture == "qwen3_next" else 1e-5)
        kv = llm.runner.kv
        assert kv is not None
        assert isinstance(kv.place, DramPlace)
        assert (kv.counters.bytes_read > 0) == (architecture != "mixtral_sliding")


def test_caches_leave_a_device_that_holds_too_few_of_them(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    """Little memory and long rows: more rows a pass, their caches in DRAM, are planned to be faster; tokens are the same."""
    path, prompts = checkpoint("mixtral"), draw_prompts((60,) * 24)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    smallest = smallest_device(path, asked[0], params)
    tokens, rows, moved = [], [], []
    for kv_on_disk in (None, False):
        options: dict[str, Any] = {"device_memory": smallest + 2_000_000, "kv_on_disk": kv_on_disk}
        with LLM(path, memory="4GiB", device="cpu", expert_slots=2, **options) as llm:
            tokens.append([each.outputs[0].token_ids for each in llm.generate(asked, params)])
            said = llm.describe()
            rows.append(int(str(said["batch_size"])) * int(str(said["num_batches"])))
            moved.append(said["kv_on_disk"])
    assert tokens[0] == tokens[1]
    assert moved == [True, False]
    assert rows[0] > rows[1]


def test_experts_that_are_quantised_become_weights_in_dram(
    tmp_path: Path, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    path = tmp_path / "fp8"
    write_fp8(checkpoint("qwen3_moe", "bfloat16"), path)
    prompts = draw_prompts(LENGTHS)
    with open_tiers(path, 2, 3) as llm, LLM(path, memory="1GiB", groups=[(2, 3)]) as plain:
        for (_, got), (_, want) in zip(run(llm, prompts), run(plain, prompts), strict=True):
            torch.testing.assert_close(got, want)


def test_a_later_call_may_have_other_slots(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts
) -> None:
    """Longer caches leave less of the device to experts; slots are given back, and taken again."""
    path = checkpoint("qwen3_moe")
    model, prompts = reference(path), draw_prompts((5, 9, 3))
    long = {"prompt_token_ids": prompts[0]}, SamplingParams(max_tokens=200, ignore_eos=True)
    slots = []
    with LLM(path, memory="1GiB", device="cpu", device_memory=smallest_device(path, *long)) as llm:
        for is_long in (False, True, False):
            if is_long:
                llm.generate(*long)
            else:
                for ids, (new_ids, logits_TV) in zip(prompts, run(llm, prompts), strict=True):
                    assert error(model, ids, new_ids, logits_TV) <= 1e-5
            slots.append(llm._open().num_slots)
    assert slots[1] == 1
    assert slots[0] > 1
    assert slots[2] > 1


def test_an_interrupted_call_leaves_nothing_behind(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts(LENGTHS)
    with open_tiers(path, 2, 3) as llm:
        want = [ids for ids, _ in run(llm, prompts)]
        interrupts = Interrupts()
        llm.runner.listen(interrupts)
        with pytest.raises(KeyboardInterrupt):
            run(llm, prompts)
        llm.runner.listen(interrupts, on=False)
        assert [ids for ids, _ in run(llm, prompts)] == want
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")]


def test_a_disk_that_fails_ends_the_call_and_not_the_process(
    tmp_path: Path, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    path = tmp_path / "copy"
    path.mkdir()
    for file in checkpoint("qwen3_moe").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    with open_tiers(path, 2, 3) as llm:
        (weights,) = path.glob("*.safetensors")
        with weights.open("r+b") as shard:
            shard.truncate(4096)
        with pytest.raises(ReadError):
            run(llm, draw_prompts(LENGTHS))


def test_the_smallest_device_that_a_refusal_names_is_enough(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    path, (ids,) = checkpoint("mixtral"), draw_prompts((9,))
    asked = {"prompt_token_ids": ids}, SamplingParams(max_tokens=12)
    with LLM(path, memory="1GiB", device="cpu", device_memory=smallest_device(path, *asked)) as llm:
        llm.generate(*asked)
        assert llm.describe()["expert_slots"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "int4"}, "quantize int4 does not go with device memory"),
        ({"kv_on_disk": True}, "kv_on_disk does not go with device memory"),
        ({"dense_layers": 1}, "dense_layers does not go with device memory"),
        ({"device_memory": "auto"}, "device memory 'auto' needs a GPU"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
    ],
)
def test_what_does_not_go_with_a_device_is_refused(
    options: dict[str, Any], says: str, checkpoint: MakeCheckpoint
) -> None:
    with pytest.raises(UsageError, match=says):
        LLM(checkpoint("qwen3_moe"), memory="1GiB", **{"device": "cpu", "device_memory": DEVICE_MEMORY, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(UsageError, match="no GPU that torch can use"):
        LLM(checkpoint("qwen3_moe"), device="cuda")
