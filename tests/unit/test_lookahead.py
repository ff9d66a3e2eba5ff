"""The lookahead predictor: the model's own selection code, asked a layer early; residuals that start at nothing; its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.engine.runner import Runner
from poise.errors import TraceError
from poise.model.inspect import ExpertsModule, build_meta_model, find_experts
from poise.model.lookahead import Lookahead
from poise.model.lookahead_sites import find_sites
from poise.model.seam import Forward
from tests.conftest import MakeCheckpoint, OpenRunner
from tests.parity.registry_configs import tiny_config

ARCHITECTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "qwen3_next", "jamba"]
"""Softmax before and after the top-k, sigmoid with biases and groups, a sparse mixer; gates alone and inside blocks."""
TOKENS = 23
Model = tuple[Any, list[ExpertsModule]]


@pytest.fixture
def opened(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> Callable[..., Model]:
    def build(architecture: str, **changes: Any) -> Model:
        runner: Runner = open_runner(checkpoint(architecture, **changes))
        return runner.model, find_experts(runner.model, architecture)

    return build


def parks(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and choices where a forward over random tokens parks; the experts answer with noise."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (1, TOKENS), generator=generator)
    seen = []
    with torch.inference_mode():
        forward = Forward(lambda: model(input_ids=ids, use_cache=False).logits)
        parked = forward.start()
        while parked is not None:
            seen.append((parked.hidden_TH.clone(), parked.top_k_index_TK.clone()))
            parked = forward.resume(torch.randn(parked.hidden_TH.shape, generator=generator))
    return [(hidden_TH.clone(), index_TK.clone()) for hidden_TH, index_TK in seen]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_its_own_seam_a_frozen_router_chooses_what_the_model_chose(
    architecture: str, opened: Callable[..., Model]
) -> None:
    model, modules = opened(architecture)
    lookahead = Lookahead.of_model(model, modules)
    assert lookahead.predicted_layers == tuple(range(1, len(modules)))
    layers = 0
    for layer, (hidden_TH, index_TK) in enumerate(parks(model)):
        chosen_TK = lookahead.own_choices_TK(layer, hidden_TH)
        assert chosen_TK.dtype == torch.int64
        assert torch.equal(chosen_TK, index_TK)
        layers += 1
    assert layers == len(modules)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_residual_changes_nothing_and_a_trained_one_does(architecture: str, opened: Callable[..., Model]) -> None:
    model, modules = opened(architecture)
    frozen, lookahead = Lookahead.of_model(model, modules), Lookahead.of_model(model, modules, width=5)
    assert lookahead.learning_layers == frozen.predicted_layers
    before = [hidden_TH for hidden_TH, _ in parks(model)]
    for layer in frozen.predicted_layers:
        router_TK = frozen.own_choices_TK(layer, before[layer - 1])
        assert torch.equal(frozen.choices_TK(layer, before[layer - 1]), router_TK)
        assert torch.equal(lookahead.choices_TK(layer, before[layer - 1]), router_TK)
        with torch.no_grad():
            lookahead.residual(layer).outer_EW.normal_(std=10)
        assert not torch.equal(lookahead.choices_TK(layer, before[layer - 1]), router_TK)


def test_what_is_added_lies_on_the_logits_that_the_router_chooses_by(opened: Callable[..., Model]) -> None:
    model, modules = opened("mixtral")
    lookahead = Lookahead.of_model(model, modules, width=5)
    hidden_TH, _ = parks(model)[0]
    with torch.no_grad():
        lookahead.residual(1).outer_EW.normal_()
        added_TE = lookahead.residual(1)(hidden_TH)
    logits_TE = lookahead.own_logits_TE(1, hidden_TH) + added_TE
    assert torch.equal(lookahead.choices_TK(1, hidden_TH), logits_TE.topk(2).indices)
    assert not logits_TE.requires_grad


@pytest.mark.parametrize(("architecture", "is_plain"), [("mixtral", True), ("qwen3_moe", True), ("deepseek_v3", False)])
def test_only_a_router_that_goes_by_its_logits_alone_is_asked_for_no_more(
    architecture: str, is_plain: bool, opened: Callable[..., Model]
) -> None:
    model, modules = opened(architecture)
    router = Lookahead.of_model(model, modules).router(1)
    assert router.goes_by_logits == is_plain
    hidden_TH, _ = parks(model)[0]
    greatest_TK = router.logits_TE(hidden_TH).topk(2).indices
    assert torch.equal(router.choices_TK(hidden_TH), greatest_TK) == is_plain


def test_weights_are_shared_and_frozen(opened: Callable[..., Model]) -> None:
    model, modules = opened("qwen3_moe")
    lookahead = Lookahead.of_model(model, modules, width=4)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    frozen = [parameter for parameter in lookahead.parameters() if not parameter.requires_grad]
    assert frozen
    assert all(parameter.data_ptr() in own for parameter in frozen)
    learning = sum(parameter.numel() for parameter in lookahead.parameters() if parameter.requires_grad)
    assert learning == 4 * (64 + 8)


def test_hash_routing_is_not_predicted_and_the_layers_behind_it_are() -> None:
    model = build_meta_model(tiny_config("deepseek_v4"), torch.float32)
    modules = find_experts(model, "deepseek_v4")
    kinds = model.config.mlp_layer_types
    assert "hash_moe" in kinds
    assert [site is None for site in find_sites(model, modules)] == [kind == "hash_moe" for kind in kinds]


def test_counts_are_of_the_real_tokens(opened: Callable[..., Model]) -> None:
    model, modules = opened("deepseek_v3")
    lookahead = Lookahead.of_model(model, modules)
    hidden_TH, _ = parks(model)[0]
    real_T = torch.arange(TOKENS) >= 4
    chosen_TK = lookahead.choices_TK(1, hidden_TH)[4:]
    counts_E = lookahead.counts_E(1, hidden_TH, real_T)
    assert counts_E.dtype == np.int64
    assert counts_E.tolist() == [int((chosen_TK == expert).sum()) for expert in range(8)]
    assert lookahead.counts_E(1, hidden_TH).sum() == 2 * TOKENS


def test_what_was_saved_predicts_the_same(opened: Callable[..., Model], tmp_path: Path) -> None:
    model, modules = opened("deepseek_v3")
    lookahead = Lookahead.of_model(model, modules, width=6)
    with torch.no_grad():
        lookahead.residual(1).outer_EW.normal_()
    lookahead.save(tmp_path / "p.safetensors", model="a" * 32)
    loaded = Lookahead.load(tmp_path / "p.safetensors", model, modules, fingerprint="a" * 32)
    hidden_TH, _ = parks(model)[0]
    assert loaded.width == 6
    assert torch.equal(loaded.choices_TK(1, hidden_TH), lookahead.choices_TK(1, hidden_TH))


def test_a_file_of_another_model_or_a_damaged_one_is_refused_in_one_line(
    opened: Callable[..., Model], tmp_path: Path
) -> None:
    model, modules = opened("qwen3_moe")
    file = tmp_path / "p.safetensors"
    Lookahead.of_model(model, modules, width=6).save(file, model="a" * 32)

    def refused(wanted: str, fingerprint: str = "a" * 32) -> None:
        with pytest.raises(TraceError, match=wanted) as error:
            Lookahead.load(file, model, modules, fingerprint=fingerprint)
        assert "\n" not in str(error.value)
        assert "poise distill MODEL" in str(error.value)

    refused("is of model a{32}, and this one is b{32}", "b" * 32)
    tensors = load_file(file)
    fields = {"kind": "lookahead predictor", "version": "1", "model": "a" * 32, "layers": json.dumps([1])}
    save_file({**tensors, "outer": tensors["outer"][:, :-1].contiguous()}, file, fields)
    refused("is damaged: its tensors are not of shapes")
    save_file(tensors, file, fields | {"layers": "[2]"})
    refused("is damaged: it is of other layers")
    save_file({**tensors, "inner": tensors["inner"] * float("nan")}, file, fields)
    refused("weights that are not finite")
    file.write_bytes(b"no file of ours")
    refused("is damaged or no safetensors file")
