"""What is recorded is where tokens go: the same as plain transformers routes them, padding and aborted passes left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise import LLM, SamplingParams
from poise.engine.recorder import Recorder
from poise.engine.routing import Ints
from poise.errors import TraceError
from poise.predict.correlation import CorrelationTable
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference


def plain_routing(model: Any, ids: Sequence[int]) -> list[Ints]:
    """What each token of one sequence chooses at each layer of plain transformers; (T, K) each."""
    chosen: list[Ints] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: chosen.append(arguments[1].numpy()))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return chosen


def counts(chosen: Sequence[Ints], experts: int) -> Ints:
    return np.stack([np.bincount(each.ravel(), minlength=experts) for each in chosen])


@pytest.mark.parametrize(("architecture", "experts", "layers"), [("qwen3_moe", 8, (0, 1)), ("deepseek_v3", 8, (1, 2))])
def test_counts_are_those_of_plain_transformers_whatever_the_padding(
    architecture: str,
    experts: int,
    layers: tuple[int, ...],
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
) -> None:
    """Prompts of different lengths share a batch, so all but the longest are padded; the routing is that of each alone."""
    path, prompts = checkpoint(architecture), draw_prompts((3, 19, 7, 12), seed=4)
    with LLM(path, memory="1GiB", expert_slots=5) as llm:
        table = CorrelationTable(num_layers=len(layers), num_experts=experts, top_k=2, forgets=False)
        recorder = Recorder(llm.spec, table=table)
        llm.runner.listen(recorder)
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(max_tokens=5, ignore_eos=True)
        )
        trace = recorder.trace("m")
        assert int(str(llm.describe()["batch_size"])) > 1, "the test needs padding"
    wanted_LE = np.zeros((len(layers), experts), dtype=np.int64)
    pairs_EE = np.zeros((experts, experts))
    for ids, result in zip(prompts, results, strict=True):
        chosen = plain_routing(reference(path), [*ids, *result.outputs[0].token_ids[:-1]])
        wanted_LE += counts(chosen, experts)
        for before_K, after_K in zip(*chosen, strict=True):
            pairs_EE[np.ix_(before_K, after_K)] += 1
    assert trace.layers == layers
    assert np.array_equal(trace.load_LE, wanted_LE)
    assert sum(trace.tokens_per_step) == sum(len(ids) + 4 for ids in prompts)
    assert (trace.counts_NLE.sum(axis=2) == 2 * np.array(trace.tokens_per_step)[:, None]).all()
    assert np.array_equal(table._pairs_LEE[1], pairs_EE)


def test_nobody_is_told_when_nobody_listens_and_a_listener_can_leave(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts
) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((4,))]
    with LLM(checkpoint("qwen3_moe"), memory="1GiB") as llm:
        recorder = Recorder(llm.spec)
        llm.runner.listen(recorder)
        llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
        steps = recorder.steps
        llm.runner.listen(recorder, on=False)
        llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
        assert recorder.steps == steps == 3


def test_an_aborted_pass_leaves_nothing(checkpoint: MakeCheckpoint) -> None:
    with LLM(checkpoint("qwen3_moe"), memory="1GiB") as llm:
        spec = llm.spec
    recorder = Recorder(spec)
    chosen = np.array([[0, 1], [2, 3], [0, 7]])
    recorder.on_layer(0, chosen)
    with pytest.raises(TraceError, match="nothing was recorded"):
        recorder.trace("m")
    recorder.on_layer(0, chosen[:1])
    recorder.on_layer(1, chosen[1:2])
    trace = recorder.trace("m")
    assert trace.tokens_per_step == (1,)
    assert trace.load_LE.sum(axis=1).tolist() == [2, 2]


def test_a_table_of_another_model_is_refused_before_loading(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    CorrelationTable(num_layers=2, num_experts=8, top_k=2).save(path, model="another")
    with pytest.raises(TraceError, match="is of model another"):
        LLM(checkpoint("qwen3_moe"), memory="1GiB", correlation_table=path)
