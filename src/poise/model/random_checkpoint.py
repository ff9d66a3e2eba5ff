"""A checkpoint of random weights for any mixture-of-experts configuration, with popular and unpopular experts.

The model is built on the meta device; then one decoder layer at a time is initialised as transformers does it, put into
the layout that its checkpoints have on disk, and written: memory holds one layer and one shard. With a skew, random
tokens run through the layers on the way, and each router is adjusted until its experts' popularity follows Zipf's law.

Random weights stand in for a model's size and shape, not for its text. Such a model repeats itself when it decodes
greedily and re-uses nearly all of the previous step's experts, which flatters caches: sample, or use a trained model
(``model.widen``), where that matters.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from poise.errors import CheckpointError, UsageError
from poise.model.inspect import DTYPES, build_meta_model, find_experts
from poise.model.widen import MAX_SHARD_BYTES, shard_names, whole_directory, write_index

CALIBRATION_ROWS, CALIBRATION_TOKENS = 4, 512
"""Random tokens on which routers are adjusted."""
ADJUSTMENTS = 60


def make_checkpoint(
    config: Any,
    target: Path,
    *,
    dtype: str = "bfloat16",
    skew: float = 0.0,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, list[float]]:
    """Writes random weights of a transformers configuration to ``target``, in the layout of its published checkpoints.

    ``skew`` is the exponent s of the popularity that the routers are adjusted to: the i-th most popular expert of a
    layer is chosen by a share of the tokens proportional to 1 / i**s, but by no more than all of them. 0 leaves
    transformers' initialisation alone. Which expert is popular is drawn anew for each layer.

    Returns that share for each MoE layer by name, most popular first, as measured on other random tokens than those of a
    later run; empty without a skew. Raises UsageError for a dtype or skew that cannot be; CheckpointError for a
    configuration that is not a causal mixture-of-experts model, and when ``target`` exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    if not (math.isfinite(skew) and skew >= 0):
        raise UsageError(f"skew {skew} is not an exponent; choose 0 (as initialised) to about 2 (a few experts do it all)")
    model = build_meta_model(config, DTYPES[dtype])
    model.eval()
    shards_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with whole_directory(target, shards_bytes) as partial, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        shards = _Shards(directory=partial, max_shard_bytes=max_shard_bytes)
        maker = _StreamedModel(model, shards)
        popularity = _make_skewed(maker, skew) if skew else _make_plain(maker)
        shards.close()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
    return popularity


@dataclass(kw_only=True, slots=True)
class _Shards:
    """Tensors on their way to disk: a file is written whenever the next tensor would not fit."""

    directory: Path
    max_shard_bytes: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    total_bytes: int = 0
    names: list[list[str]] = field(default_factory=list)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in sorted(tensors.items()):
            if self.pending and self.pending_bytes + tensor.nbytes > self.max_shard_bytes:
                self._write()
            self.pending[name] = tensor.contiguous()
            self.pending_bytes += tensor.nbytes
            self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, names the files by their number, and writes the index if there are several."""
        self._write()
        files = shard_names(len(self.names))
        for number, file in enumerate(files):
            (self.directory / f"{number}.part").rename(self.directory / file)
        if len(files) > 1:
            write_index(self.directory, dict(zip(files, self.names, strict=True)), self.total_bytes)

    def _write(self) -> None:
        save_file(self.pending, self.directory / f"{len(self.names)}.part", metadata={"format": "pt"})
        self.names.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0


class _StreamedModel:
    """A model on the meta device that is initialised and written one decoder layer at a time."""

    def __init__(self, model: Any, shards: _Shards) -> None:
        self.model = model
        self.shards = shards
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        assert lists, f"{type(model).__name__} has no list of layers"
        name, layers = lists[0]
        self.layers = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in key for part in model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.float()

    def make_rest(self) -> None:
        """Initialises what is in no layer: embeddings, the last norm, the head."""
        inside = {id(module) for layer in self.layers.values() for module in layer.modules()}
        self._initialise([module for module in self.model.modules() if id(module) not in inside])

    def write_rest(self) -> None:
        tied = self.model.all_tied_weights_keys
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
        self._write({name: tensor for name, tensor in state.items() if tensor.device.type != "meta"})

    def make_layer(self, name: str) -> None:
        self._initialise(list(self.layers[name].modules()))

    def write_layer(self, name: str) -> None:
        """Writes a layer and gives its memory back."""
        self._write({f"{name}.{key}": tensor for key, tensor in self.layers[name].state_dict().items()})
        self.layers[name].to("meta")

    def _initialise(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.to_empty(device="cpu", recurse=False)
        for module in reversed(modules):
            self.model._init_weights(module)

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        self.shards.add(revert_weight_conversion(self.model, state))


def _make_plain(maker: _StreamedModel) -> None:
    maker.make_rest()
    maker.write_rest()
    for name in maker.layers:
        maker.make_layer(name)
        maker.write_layer(name)


def _make_skewed(maker: _StreamedModel, skew: float) -> dict[str, list[float]]:
    """Runs random tokens through the layers; each is made as they reach it and written as they leave it."""
    routers = _find_routers(maker.model)
    maker.make_rest()
    if any(router.bias is None for router in routers):
        _share_direction(maker.model.get_input_embeddings().weight)
    maker.write_rest()
    shares: dict[str, list[float]] = {}

    def adjust(router: _Router, args: tuple[Any, ...]) -> None:
        shares[router.experts] = _adjust(router, args, skew)

    for name, layer in maker.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: maker.make_layer(name))
        layer.register_forward_hook(lambda *_, name=name: maker.write_layer(name))
    for router in routers:
        router.block.register_forward_pre_hook(lambda _, args, router=router: adjust(router, args))
    config = maker.model.config.get_text_config()
    tokens = min(CALIBRATION_TOKENS, config.max_position_embeddings)
    maker.model.base_model(input_ids=torch.randint(config.vocab_size, (CALIBRATION_ROWS, tokens)), use_cache=False)
    return shares


def _share_direction(weight: torch.Tensor) -> None:
    """Adds one random vector, as long as an embedding is, to all embeddings: without it no direction is common to all
    tokens, and a linear router without a bias cannot prefer an expert for more than half of them."""
    weight += weight.float().square().mean().sqrt() * torch.randn(weight.shape[1])


class _StopAtExperts(Exception):  # noqa: N818 - leaves a forward pass early; nothing is wrong
    """Carries the chosen experts (T, K) out of a forward pass that need not go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Router:
    """The names of one router's parts. ``bias`` is added to the scores that experts are chosen by, where there is one."""

    block: nn.Module
    experts: str
    num_experts: int
    weight: str
    bias: str | None

    def chosen_TK(self, args: tuple[Any, ...]) -> torch.Tensor:
        """The experts that the block's own routing chooses for each token."""
        experts = self.block.get_submodule(self.experts.rpartition(".")[2])

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _StopAtExperts(args[1])

        handle = experts.register_forward_pre_hook(stop)
        try:
            self.block.forward(*args)
        except _StopAtExperts as seen:
            return seen.args[0]
        finally:
            handle.remove()
        raise AssertionError(f"{self.experts} were not called")

    def share_E(self, args):
        chosen = self.chosen_TK(args)
        return torch.bincount(chosen.flatten(), minlength=self.num_experts) / chosen.shape[0]

    def offset_setter(self, hidden_TH):
        tensors = dict(self.block.named_parameters()) | dict(self.block.named_buffers())
        weight_EH = tensors[self.weight]
        if not weight_EH.count_nonzero():
            weight_EH.normal_(std=0.02)
        if self.bias is not None:
            bias_E = tensors[self.bias]
            return lambda offset_E: bias_E.copy_(offset_E.view_as(bias_E))
        mean_H = hidden_TH.float().mean(0)
        unit_H = mean_H / mean_H.norm()
        plain_EH = weight_EH.float() - torch.outer(weight_EH.float() @ unit_H, unit_H)
        return lambda offset_E: weight_EH.copy_(plain_EH + torch.outer(offset_E / mean_H.norm(), unit_H))


def _find_routers(model: Any) -> list[_Router]:
    routers = []
    for experts in find_experts(model, model.config.model_type):
        block = model.get_submodule(experts.name.rpartition(".")[0])
        inside = experts.name.rpartition(".")[2] + "."
        tensors = {n: t for n, t in [*block.named_parameters(), *block.named_buffers()] if not n.startswith(inside) and "shared" not in n}
        weights = [n for n, t in tensors.items() if n.split(".")[0] in ("gate", "router") and t.dim() == 2 and t.shape[0] == experts.num_experts]
        biases = [n for n, t in tensors.items() if "bias" in n and t.numel() == experts.num_experts]
        if len(weights) != 1:
            raise CheckpointError(f"cannot find the router of {experts.name} among {list(tensors)}")
        routers.append(_Router(block=block, experts=experts.name, num_experts=experts.num_experts, weight=weights[0], bias=biases[0] if biases else None))
    return routers


def _adjust(router: _Router, args: tuple[Any, ...], skew: float) -> list[float]:
    hidden_TH = args[0].flatten(0, -2)
    set_offset = router.offset_setter(hidden_TH)
    set_offset(torch.zeros(router.num_experts))
    chosen_TK = router.chosen_TK(args)
    wanted_E = zipf_shares(router.num_experts, chosen_TK.shape[1], skew)[torch.randperm(router.num_experts)]
    floor = 0.5 / len(hidden_TH)
    offset_E = best_offset_E = torch.zeros(router.num_experts)
    best_E, best_error, step = torch.zeros_like(wanted_E), math.inf, 1.0
    trail=[]
    for _ in range(ADJUSTMENTS):
        set_offset(offset_E)
        share_E = router.share_E(args)
        error = (share_E - wanted_E).abs().sum().item()
        trail.append(error)
        if error < best_error:
            best_error, best_E, best_offset_E = error, share_E, offset_E
            step *= 1.3
        else:
            step /= 2
        push_E = torch.special.ndtri(wanted_E.clamp(floor, 1 - floor)) - torch.special.ndtri(best_E.clamp(floor, 1 - floor))
        offset_E = best_offset_E + step * push_E
    set_offset(best_offset_E)
    import os
    if os.environ.get("DBG"): print(router.experts, "err", [round(t/2/chosen_TK.shape[1],3) for t in trail], step)
    return best_E.sort(descending=True).values.tolist()


def zipf_shares(num_experts: int, top_k: int, skew: float) -> torch.Tensor:
    """The share of tokens that choose the i-th most popular expert: Zipf's law, but never above 1; sums to ``top_k``."""
    weights_E = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -skew
    for certain in range(top_k):
        shares = weights_E[certain:] / weights_E[certain:].sum() * (top_k - certain)
        if shares[0] <= 1 + 1e-9:
            return torch.cat([torch.ones(certain, dtype=torch.float64), shares])
    raise AssertionError("unreachable")
