"""A checkpoint of random weights for any mixture-of-experts configuration, with popular and unpopular experts.

The model is built on the meta device; then one decoder layer at a time is initialised as transformers does it, brought
into the layout that published checkpoints have, and written: memory holds one layer and one shard. With a skew, random
tokens run through the layers on the way, and each router is adjusted until its experts' popularity follows Zipf's law.

Random weights stand in for a model's size and shape, not for its text: there is no tokenizer, and a model of random
weights repeats itself, re-using nearly all of the previous step's experts, which flatters caches. Sample, feed it given
tokens, or widen a trained model (``model.widen``) where that matters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from poise.errors import CheckpointError, UsageError
from poise.model.inspect import DTYPES, build_meta_model, find_experts
from poise.model.new_checkpoint import MAX_SHARD_BYTES, shard_names, whole_directory, write_index

ADJUSTING_ROWS, ADJUSTING_TOKENS = 16, 256
"""Random tokens on which the routers of a skewed model are adjusted."""
MAX_ADJUSTMENTS = 60
DAMPED = ("o_proj", "down_proj")
"""By the end of their names, in attention and in experts, fused or not."""
CLOSE_ENOUGH = 0.005
"""Adjusting ends when so small a share of the choices would have to move."""


def make_checkpoint(
    config: Any,
    target: Path,
    *,
    dtype: str = "bfloat16",
    skew: float = 0.0,
    damping: float = 1.0,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, list[float]]:
    """Writes random weights of a transformers configuration to ``target``, in the layout of its published checkpoints.

    ``skew`` is the exponent s: the i-th most popular expert of a layer is chosen by a share of the tokens proportional
    to 1 / i**s, though never by more than all of them (``zipf_shares``). Which expert is popular is drawn for each
    layer. 0 leaves the routers as initialised. For routers without a bias, all embeddings get a direction in common.

    ``damping`` multiplies the projections that add to the hidden states (``DAMPED``). With 1 a layer of random weights replaces
    most of what it is given; below, hidden states change little from layer to layer, as trained models' do.

    Returns the shares reached on the adjusting tokens, most popular first, for each MoE layer's experts by name; nothing
    without a skew. Off target by about 0.5 % of the choices there; on other random tokens by 1-3 % in tiny models of 16
    architectures (FlexOLMo, AFMoE: 5-20 %), and by 3-15 %, growing with depth, at 8 layers x 64 experts top-8.

    Raises UsageError for a dtype, a skew or a damping that cannot be; CheckpointError for a configuration that is no causal
    model, for a router of a kind that cannot be skewed, and when ``target`` exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    if not (math.isfinite(skew) and skew >= 0):
        raise UsageError(
            f"skew {skew} is no exponent; choose 0 (routers as initialised) to about 2 (few experts do it all)"
        )
    if not 0 < damping <= 1:
        raise UsageError(f"damping {damping} is not supported; choose 1 (weights as initialised) or less, above 0")
    model = build_meta_model(config, DTYPES[dtype]).eval()
    weights_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with whole_directory(target, weights_bytes) as partial, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        shards = _Shards(directory=partial, max_shard_bytes=max_shard_bytes)
        streamed = _StreamedModel(model, shards, damping)
        shares = _make_skewed(streamed, skew) if skew else _make_plain(streamed)
        shards.close()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
    return shares


def zipf_shares(num_experts: int, top_k: int, skew: float) -> torch.Tensor:
    """The share of tokens that choose the i-th most popular expert, shape (E,), float32; it sums to ``top_k``.

    Proportional to 1 / i**skew, but no expert is chosen by more than all tokens: what is too much goes to the others.
    """
    weights_E = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -skew
    for certain in range(top_k):
        shares = weights_E[certain:] / weights_E[certain:].sum() * (top_k - certain)
        if shares[0] <= 1 + 1e-9:
            return torch.cat([torch.ones(certain), shares.float()])
    raise AssertionError(f"top-{top_k} of {num_experts} experts")


@dataclass(kw_only=True, slots=True)
class _Shards:
    """Tensors on their way to disk: a file is written whenever the next tensor would not fit into it."""

    directory: Path
    max_shard_bytes: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    names: list[list[str]] = field(default_factory=list)
    total_bytes: int = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in sorted(tensors.items()):
            pending_bytes = sum(other.nbytes for other in self.pending.values())
            if self.pending and pending_bytes + tensor.nbytes > self.max_shard_bytes:
                self._write()
            self.pending[name] = tensor.contiguous()
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
        file = self.directory / f"{len(self.names)}.part"
        save_file(self.pending, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes files that only their owner can read
        self.names.append(list(self.pending))
        self.pending = {}


class _StreamedModel:
    """A model on the meta device whose layers come into memory, are written and vanish, one at a time."""

    def __init__(self, model: Any, shards: _Shards, damping: float) -> None:
        self.model = model
        self._shards = shards
        self._damping = damping
        name, layers = next(item for item in model.named_modules() if isinstance(item[1], nn.ModuleList))
        self.layers: dict[str, nn.Module] = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
        for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if any(part in key for part in model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.float()

    def make_rest(self) -> None:
        """What is in no layer: embeddings, the last norm, the head. It stays in memory."""
        inside = {id(module) for layer in self.layers.values() for module in layer.modules()}
        self._initialise([module for module in self.model.modules() if id(module) not in inside])

    def write_rest(self) -> None:
        tied = self.model.all_tied_weights_keys
        self._write(
            {key: tensor for key, tensor in self.model.state_dict().items() if key not in tied and not tensor.is_meta}
        )

    def make_layer(self, name: str) -> None:
        self._initialise(list(self.layers[name].modules()))
        for key, weight in self.layers[name].named_parameters():
            # AFMoE's routers start at zero: all tokens would choose the first experts.
            if weight.dim() == 2 and ("router" in key or "gate" in key) and not weight.any():
                weight.normal_(std=0.02)
            if self._damping < 1 and key.removesuffix(".weight").endswith(DAMPED):
                weight.mul_(self._damping)

    def write_layer(self, name: str) -> None:
        self._write({f"{name}.{key}": tensor for key, tensor in self.layers[name].state_dict().items()})
        self.layers[name].to("meta")

    def _initialise(self, modules: list[nn.Module]) -> None:
        for module in modules:
            module.to_empty(device="cpu", recurse=False)
        for module in reversed(modules):
            self.model._init_weights(module)

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        self._shards.add(revert_weight_conversion(self.model, state))


def _make_plain(streamed: _StreamedModel) -> dict[str, list[float]]:
    streamed.make_rest()
    streamed.write_rest()
    for name in streamed.layers:
        streamed.make_layer(name)
        streamed.write_layer(name)
    return {}


def _make_skewed(streamed: _StreamedModel, skew: float) -> dict[str, list[float]]:
    """Runs random tokens through the layers: each is made as they reach it and written as they leave it."""
    model, config = streamed.model, streamed.model.config.get_text_config()
    modules = find_experts(model, config.model_type)
    routers = [_find_router(model, experts.name, experts.num_experts) for experts in modules]
    shares: dict[str, list[float]] = {}
    for name, layer in streamed.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: streamed.make_layer(name))
        layer.register_forward_hook(lambda *_, name=name: streamed.write_layer(name))
    for router in routers:
        router.block.register_forward_pre_hook(
            lambda _, args, router=router: shares.update({router.experts: _adjust(router, args, skew)})
        )
    streamed.make_rest()
    if any(router.bias is None for router in routers):
        # Without a direction that all tokens share, a linear router can prefer an expert for half of them at most.
        embeddings_VH = model.get_input_embeddings().weight
        embeddings_VH += 2 * embeddings_VH.float().square().mean().sqrt() * torch.randn(embeddings_VH.shape[1])
    streamed.write_rest()
    tokens = min(ADJUSTING_TOKENS, config.max_position_embeddings)
    model.base_model(input_ids=torch.randint(config.vocab_size, (ADJUSTING_ROWS, tokens)), use_cache=False)
    return shares


class _AtExperts(Exception):  # noqa: N818
    """Carries the choice (T, K) out of a forward pass that need not go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Router:
    """A MoE block and its router's tensors by name. ``bias``, if any, is added to what experts are chosen by."""

    block: nn.Module
    experts: str
    num_experts: int
    weight: str
    bias: str | None

    def shares_E(self, args: tuple[Any, ...]) -> torch.Tensor:
        """The share of tokens that choose each expert, by the model's own routing. They sum to top-k."""

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _AtExperts(args[1])

        handle = self.block.get_submodule(self.experts.rpartition(".")[2]).register_forward_pre_hook(stop)
        try:
            self.block.forward(*args)
        except _AtExperts as seen:
            chosen_TK: torch.Tensor = seen.args[0]
            return torch.bincount(chosen_TK.flatten(), minlength=self.num_experts) / len(chosen_TK)
        finally:
            handle.remove()
        raise AssertionError(f"the forward pass did not reach {self.experts}")

    def setter(self, hidden_TH: torch.Tensor) -> Callable[[torch.Tensor], object]:
        """A function that gives the experts the offsets (E,): through the bias, or along the tokens' mean direction."""
        if self.bias is not None:
            bias = _tensors(self.block)[self.bias]
            return lambda offset_E: bias.copy_(offset_E.view_as(bias))
        weight_EH = _tensors(self.block)[self.weight]
        mean_H = hidden_TH.float().mean(0)
        unit_H = mean_H / mean_H.norm()
        plain_EH = weight_EH.float() - torch.outer(weight_EH.float() @ unit_H, unit_H)
        return lambda offset_E: weight_EH.copy_(plain_EH + torch.outer(offset_E / mean_H.norm(), unit_H))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def _find_router(model: nn.Module, experts: str, num_experts: int) -> _Router:
    """The router beside the experts. Raises CheckpointError when it is not one matrix (E, H)."""
    path, _, inside = experts.rpartition(".")
    block = model.get_submodule(path)
    tensors = {
        key: tensor for key, tensor in _tensors(block).items() if key.split(".")[0] != inside and "shared" not in key
    }
    matrices = [key for key, tensor in tensors.items() if key.split(".")[0] in ("gate", "router") and tensor.dim() == 2]
    weights = [key for key in matrices if tensors[key].shape[0] == num_experts]
    biases = [key for key, tensor in tensors.items() if "bias" in key and tensor.numel() == num_experts]
    if len(weights) != 1:
        raise CheckpointError(
            f"the router of {experts} is of a kind that cannot be skewed; choose skew 0 or another model type"
        )
    return _Router(
        block=block, experts=experts, num_experts=num_experts, weight=weights[0], bias=next(iter(biases), None)
    )


def _adjust(router: _Router, args: tuple[Any, ...], skew: float) -> list[float]:
    """Finds offsets with which the block's experts get their shares of these tokens. Returns the shares reached.

    Each step moves every expert by the distance, in standard deviations of a normal score, between the share it has and
    the share it should have; the step is cut by half whenever that made it worse.
    """
    hidden_TH = args[0].flatten(0, -2)
    set_offset = router.setter(hidden_TH)
    top_k = round(router.shares_E(args).sum().item())
    wanted_E = zipf_shares(router.num_experts, top_k, skew)[torch.randperm(router.num_experts)]
    floor = 0.5 / len(hidden_TH)
    offset_E = torch.zeros(router.num_experts)
    best_error, best_offset_E, best_shares_E, step = math.inf, offset_E, offset_E, 1.0
    for _ in range(MAX_ADJUSTMENTS):
        set_offset(offset_E)
        shares_E = router.shares_E(args)
        error = (shares_E - wanted_E).abs().sum().item() / (2 * top_k)
        step *= 1.3 if error < best_error else 0.5
        if error < best_error:
            best_error, best_offset_E, best_shares_E = error, offset_E, shares_E
        if error < CLOSE_ENOUGH:
            break
        offset_E = best_offset_E + step * (_normal_quantile(wanted_E, floor) - _normal_quantile(best_shares_E, floor))
    set_offset(best_offset_E)
    return best_shares_E.sort(descending=True).values.tolist()


def _normal_quantile(share_E: torch.Tensor, floor: float) -> torch.Tensor:
    quantile_E: torch.Tensor = torch.special.ndtri(share_E.clamp(floor, 1 - floor))
    return quantile_E
