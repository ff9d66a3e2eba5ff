"""Dense weights that stream: what is left out of loading, what cannot stream, errors and aborts, budgets."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise import LLM, SamplingParams
from poise.errors import BudgetError, ReadError, UsageError
from poise.model.decoder_layers import find_decoder_layers
from poise.model.inspect import find_experts
from poise.model.reader import Reader
from poise.plan.dense import NUM_SLOTS
from tests.conftest import DrawPrompts, MakeCheckpoint, open_layout, tiny_config, write_checkpoint

CACHE_BYTES = 209 * 8 * 2 * 512 * 4
"""Of the longest row in the test of budgets."""
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


def prompts_of(draw_prompts: DrawPrompts) -> list[Any]:
    return [{"prompt_token_ids": ids} for ids in draw_prompts((9, 4, 7))]


def ids_of(llm: LLM, prompts: list[Any]) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompts, PARAMS)]


def test_streamed_weights_lie_on_the_meta_device_outside_their_turn(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    with LLM(checkpoint("mixtral", num_hidden_layers=5), memory="1GiB", dense_layers=1) as llm:
        ids_of(llm, prompts_of(draw_prompts))
        layers = llm.runner.model.model.layers
        are_there = [not any(parameter.is_meta for parameter in layer.parameters()) for layer in layers]
        assert are_there == [False, False, False, True, False]
        assert not llm.runner.model.lm_head.weight.is_meta
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")]


def test_few_layers_stay_as_their_slots_would_take_as_much(checkpoint: MakeCheckpoint) -> None:
    with LLM(checkpoint("mixtral", num_hidden_layers=NUM_SLOTS), memory="1GiB", dense_layers=0) as llm:
        assert llm.describe()["dense_layers_streamed"] == 0


@pytest.mark.parametrize("given", [-1, 6])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(checkpoint: MakeCheckpoint, given: int) -> None:
    with pytest.raises(UsageError, match="the model has 5 layers: give 0 to 5"):
        LLM(checkpoint("mixtral", num_hidden_layers=5), memory="1GiB", dense_layers=given)


def test_what_is_not_as_on_disk_stays_in_memory(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_config("mixtral", num_hidden_layers=4), torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    wide = "model.layers.1.self_attn.q_proj.weight"
    tensors[wide] = tensors[wide].float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model, layout, dtype = open_layout(path)
    layers = find_decoder_layers(model, find_experts(model, "mixtral"), layout, dtype)
    assert [len(layer.parts) for layer in layers] == [7, 6, 7, 7]
    assert wide not in layers[1].parts
    model, layout, dtype = open_layout(path, "float32")
    layers = find_decoder_layers(model, find_experts(model, "mixtral"), layout, dtype)
    assert [list(layer.parts) for layer in layers] == [[], [wide], [], []]


def test_shared_and_wide_parameters_stay_in_memory(checkpoint: MakeCheckpoint) -> None:
    model, layout, dtype = open_layout(checkpoint("deepseek_v3", "bfloat16"))
    modules = find_experts(model, "deepseek_v3")
    model.model.layers[0].self_attn.o_proj.weight = model.model.layers[1].self_attn.o_proj.weight
    names = {name for layer in find_decoder_layers(model, modules, layout, dtype) for name in layer.parts}
    assert "model.layers.2.self_attn.o_proj.weight" in names
    assert "model.layers.1.self_attn.o_proj.weight" not in names
    assert not any("bias" in name for name in names), "the router's correction is a buffer, or kept in fp32"


def test_an_abort_in_the_middle_leaves_the_stream_usable(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    prompts = prompts_of(draw_prompts)
    with LLM(checkpoint("mixtral", num_hidden_layers=5), memory="1GiB", dense_layers=0, groups=[(1, 3)]) as llm:
        want = ids_of(llm, prompts)
        for layer in range(5):

            def stop(*_: Any) -> None:
                raise KeyboardInterrupt

            hook = llm.runner.model.model.layers[layer].mlp.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompts, PARAMS)
            hook.remove()
            assert ids_of(llm, prompts) == want


def test_a_disk_that_fails_is_said_and_the_call_can_be_repeated(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(draw_prompts)
    with LLM(checkpoint("mixtral", num_hidden_layers=5), memory="1GiB", dense_layers=0) as llm:
        want = ids_of(llm, prompts)

        def fail(reader: Reader, reads: Any, done: Any, *, label: Any) -> None:
            if label[0] != "read dense":
                return submit(reader, reads, done, label=label)
            return done(ReadError("reading failed: Input/output error"))

        submit = Reader.submit
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "submit", fail)
            with pytest.raises(ReadError):
                llm.generate(prompts, PARAMS)
        assert ids_of(llm, prompts) == want


def test_a_budget_below_the_dense_weights_streams_them_and_the_refusal_names_one_that_works(
    tmp_path: Path, draw_prompts: DrawPrompts
) -> None:
    config = tiny_config(
        "mixtral", num_hidden_layers=8, hidden_size=512, intermediate_size=64, vocab_size=128, num_key_value_heads=4
    )
    path = write_checkpoint(tmp_path, config, torch.float32)
    prompts = prompts_of(draw_prompts)
    with LLM(path, memory="1GiB") as llm:
        dense_bytes, want = llm.spec.dense_bytes, ids_of(llm, prompts)
        assert llm.describe()["dense_layers_streamed"] == 0
    with pytest.raises(BudgetError) as refused:
        LLM(path, memory=1 << 20)
    with LLM(path, memory=refused.value.smallest_bytes, kv_on_disk=False) as llm:
        assert int(str(llm.describe()["dense_layers_streamed"])) > NUM_SLOTS
        with pytest.raises(BudgetError) as small:
            llm.generate(prompts, SamplingParams(max_tokens=200))
    assert small.value.smallest_bytes < dense_bytes + (64 << 20) + CACHE_BYTES
    with LLM(path, memory=small.value.smallest_bytes, kv_on_disk=False) as llm:
        assert int(str(llm.describe()["dense_layers_streamed"])) > 0
        assert ids_of(llm, prompts) == want
        llm.generate(prompts[:1], SamplingParams(max_tokens=200))


def test_doors_follow_the_stream_when_another_call_streams_other_layers(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(draw_prompts)
    with LLM(checkpoint("mixtral", num_hidden_layers=6), memory="1GiB", groups=[(1, 3)]) as llm:
        want, planned, ways = ids_of(llm, prompts), llm._plan_for, llm._loaded()._layers.ways
        streamed = set()
        for way in (*ways, *reversed(ways)):
            monkeypatch.setattr(llm, "_plan_for", lambda rows, way=way: replace(planned(rows), dense=way))
            assert ids_of(llm, prompts) == want
            streamed.add(llm.describe()["dense_layers_streamed"])
        assert len(streamed) > 1, "the test needs ways that differ"
