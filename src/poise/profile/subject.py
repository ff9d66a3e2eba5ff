"""What is measured: a model's decoder layers on random or real weights, and its experts on disk where there are any.

Only the layers that a measurement runs are filled; the others stay on the meta device and take no memory. Their values are
random: the time of a product does not depend on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

from poise.model.dense import take_out_experts
from poise.model.hub import find_checkpoint
from poise.model.inspect import ExpertsModule, build_meta_model, find_experts, load_config, own_dtype, stated
from poise.model.layout import ExpertSource, find_layout
from poise.model.seam import attach
from poise.spec.curve import Shape

MAX_PERIOD = 8
"""MoE layers of different kinds that one measurement goes through at most."""
RANDOM_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model whose experts are taken out and whose seam is attached. ``sources_LE``: its experts on disk, or None.

    The decoder layers up to MoE layer ``period`` (or the last) are in memory. ``int4``: experts are multiplied with in 4 bits
    (``model.int4``), whatever they are on disk.
    """

    name: str
    model: Any
    modules: tuple[ExpertsModule, ...]
    dtype: torch.dtype
    sources_LE: Sequence[Sequence[ExpertSource]] | None = None
    int4: bool = False

    @property
    def experts_module(self) -> Any:
        """The first MoE layer's experts."""
        return self.model.get_submodule(self.modules[0].name)

    @property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """One expert's parameters."""
        return {param: tuple(getattr(self.experts_module, param).shape[1:]) for param in self.modules[0].params}

    @property
    def expert_flops_per_token(self) -> int:
        """Two for every weight of an expert's matrices."""
        return sum(2 * shape[0] * shape[1] for shape in self.param_shapes.values() if len(shape) == 2)

    @property
    def hidden(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def expert_shape(self) -> Shape:
        matrices = 3 if getattr(self.experts_module, "has_gate", True) else 2
        inner = self.expert_flops_per_token // (2 * matrices * self.hidden)
        shape = self._shape(max(1, inner))
        return replace(shape, dtype="int4") if self.int4 else shape

    @property
    def attention_shape(self) -> Shape:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        return self._shape(heads * (stated(config, "head_dim") or self.hidden // heads))

    @property
    def gate_shape(self) -> Shape:
        return self._shape(self.modules[0].num_experts)

    @property
    def dense_shape(self) -> Shape:
        return self._shape(self.vocabulary)

    @property
    def period(self) -> int:
        """The fewest MoE layers after which the kinds of layers repeat, at most ``MAX_PERIOD``."""
        kinds = _layer_kinds(self.model, self.modules)
        repeats = (n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n])
        return min(next(repeats, len(kinds)), MAX_PERIOD)

    def fingerprint(self) -> str:
        """Models that share it take the same times: shapes, dtype, and the kinds of layers."""
        kinds = [repr(kind) for kind in _layer_kinds(self.model, self.modules)]
        facts = [type(self.model).__name__, str(self.dtype), self.param_shapes, kinds, self.vocabulary]
        facts += ["int4"] * self.int4
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _shape(self, intermediate: int) -> Shape:
        return Shape(hidden=self.hidden, intermediate=intermediate, dtype=str(self.dtype).removeprefix("torch."))


def subject_of_checkpoint(
    path: str | Path, *, dtype_for: Callable[[torch.dtype], torch.dtype] = lambda own: own, int4: bool = False
) -> Subject:
    """A checkpoint's shapes and its experts on disk. Raises CheckpointError for one that Poise does not run.

    ``dtype_for`` says what to compute in, given the checkpoint's own dtype.
    """
    checkpoint = find_checkpoint(path)
    config = load_config(checkpoint)
    dtype = dtype_for(own_dtype(checkpoint))
    model = build_meta_model(config, dtype)
    modules = find_experts(model, config.model_type)
    layout = find_layout(checkpoint, model, modules, dtype)
    return replace(_prepared(checkpoint.path.name, model, modules, dtype, layout.experts_LE), int4=int4)


def default_subjects() -> tuple[Subject, ...]:
    """Layers of three common models: many small experts, few large ones, and biases with experts as wide as the model."""
    configs = {
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=2,
        ),
        "Mixtral-8x7B": MixtralConfig(num_hidden_layers=2),
        "GPT-OSS-20B": GptOssConfig(num_hidden_layers=3, num_local_experts=32),
    }
    return tuple(subject_of_config(name, config, torch.bfloat16) for name, config in configs.items())


def subject_of_config(name: str, config: Any, dtype: torch.dtype) -> Subject:
    """A transformers configuration with random weights and nothing on disk."""
    model = build_meta_model(config, dtype)
    return _prepared(name, model, find_experts(model, config.model_type), dtype, None)


def _prepared(
    name: str,
    model: Any,
    modules: Sequence[ExpertsModule],
    dtype: torch.dtype,
    sources_LE: Sequence[Sequence[ExpertSource]] | None,
) -> Subject:
    take_out_experts(model, modules)
    attach(model)
    model.eval()
    subject = Subject(name=name, model=model, modules=tuple(modules), dtype=dtype, sources_LE=sources_LE)
    _fill_layers(subject)
    return subject


def _fill_layers(subject: Subject) -> None:
    """Random weights for the layers that a measurement runs, and an embedding of one token."""
    last = subject.modules[min(subject.period, len(subject.modules) - 1)]
    layers = last.name[: last.name.index(f".{last.layer}.")] + "."
    model = subject.model
    model.set_input_embeddings(nn.Embedding(1, subject.hidden, dtype=subject.dtype))
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        layer = name.removeprefix(layers).split(".")[0] if name.startswith(layers) else "0"
        if module is head or (layer.isdigit() and int(layer) > last.layer):
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[key] = nn.Parameter(_filled(parameter), requires_grad=False)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _filled(like: torch.Tensor) -> torch.Tensor:
    if like.dim() < 2 or not like.is_floating_point():
        return torch.ones(like.shape, dtype=like.dtype)
    return fill_random(torch.empty(like.shape, dtype=like.dtype))


def fill_random(tensor: torch.Tensor) -> torch.Tensor:
    """Small random numbers, the same million over and over: drawing gigabytes of them would take longer than measuring."""
    flat = tensor.view(-1)
    block = torch.empty(min(flat.numel(), RANDOM_BLOCK), dtype=tensor.dtype)
    block.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(0))
    for place in torch.split(flat, len(block)):
        place.copy_(block[: len(place)])
    return tensor


def _layer_kinds(model: nn.Module, modules: Sequence[ExpertsModule]) -> list[object]:
    """For every MoE layer what is in it and in the layers since the one before: parameter shapes, and the kind by config."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()  # type: ignore[operator, union-attr]
    layers = modules[0].name[: modules[0].name.index(f".{modules[0].layer}.")]
    stack = model.get_submodule(layers)
    kinds: list[object] = []
    begin = modules[0].layer
    for module in modules:
        kind = [
            (list(types[index : index + 1]), [(key, list(value.shape)) for key, value in each.named_parameters()])
            for index, each in ((i, stack[i]) for i in range(begin, module.layer + 1))  # type: ignore[index]
        ]
        kinds.append(kind)
        begin = module.layer + 1
    return kinds
