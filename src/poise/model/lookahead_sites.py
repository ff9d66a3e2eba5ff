"""Where a model's routers are, found by watching it run: no table of architectures.

The model's twin on the meta device runs a few tokens up to its experts, layer by layer. The router of a layer is the module
that returned the very choices with which the forward parked; where a block's own method makes the choice, it is that block,
which is run up to its experts. A router can be asked a layer early only if it looks at nothing but the hidden states that its
experts get, and at its own weights: hash routing (token ids), routers that carry a state from layer to layer, and routers
that see other hidden states than their experts cannot, and have no site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as meta_config

from poise.model.cache import make_cache
from poise.model.inspect import ExpertsModule, build_meta_model
from poise.model.seam import Forward, Parked, attach

TOKENS = 3
"""Of the forward that is watched: no size of any model, so that dimensions can be told apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FromModel:
    """An argument that is one of the model's own parameters or buffers."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSite:
    """How one MoE layer's router is asked. ``module``: its name in the model; ``is_block``: it is the block around it.

    ``hidden_at``: position or name of the argument that takes the hidden states, which have ``hidden_dims`` dimensions there
    and dtype ``dtype``; the others are ``arguments`` and ``keywords``. ``index_at``: where in what it returns the choices are.
    """

    module: str
    is_block: bool
    hidden_at: int | str
    hidden_dims: int
    hidden_size: int
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    index_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A module that was called, and what it returned; None while it has not."""

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any


def find_sites(model: Any, modules: Sequence[ExpertsModule]) -> tuple[RouterSite | None, ...]:
    """The router of each MoE layer, None where it cannot be asked a layer early. ``model``: on any device, loaded or not.

    None everywhere for a class whose forward looks at values, of which the twin has none (no class of transformers 5.23).
    """
    twin = build_meta_model(model.config, model.dtype).eval()
    attach(twin)
    names = {id(value): name for name, value in [*twin.named_parameters(), *twin.named_buffers()]}
    position = {id(twin.get_submodule(module.name)): layer for layer, module in enumerate(modules)}
    sites: list[RouterSite | None] = [None] * len(modules)
    watch = _Watch(twin)
    ids = torch.ones((1, TOKENS), dtype=torch.long, device="meta")
    cache = make_cache(twin)
    with torch.inference_mode(), meta_config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        forward = Forward(lambda: twin(input_ids=ids, past_key_values=cache, use_cache=True).logits)
        try:
            parked = forward.start()
            while parked is not None:
                layer = position[id(parked.module)]
                sites[layer] = _site(watch, parked, names, modules[layer].name)
                watch.returned.clear()
                parked = forward.resume(torch.zeros_like(parked.hidden_TH))
        except NotImplementedError:
            return (None,) * len(modules)
        finally:
            forward.abort()
    return tuple(sites)


class _Watch:
    """Takes down what every module of a model is called with and what it returns."""

    def __init__(self, model: nn.Module) -> None:
        self.running: list[_Call] = []
        self.returned: list[_Call] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name), with_kwargs=True)

    def _before(self, name: str) -> Any:
        def note(module: nn.Module, arguments: Any, keywords: Any) -> None:
            self.running.append(_Call(name=name, arguments=arguments, keywords=keywords, output=None))

        return note

    def _after(self, name: str) -> Any:
        def note(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            called = self.running.pop()
            assert called.name == name, "modules return in the order in which they were called"
            self.returned.append(_Call(name=name, arguments=called.arguments, keywords=called.keywords, output=output))

        return note


def _site(watch: _Watch, parked: Parked, names: Mapping[int, str], experts: str) -> RouterSite | None:
    """The innermost module that returned the choices, else the innermost block around the experts that can be asked."""
    for call in watch.returned:
        outputs = call.output if isinstance(call.output, tuple) else (call.output,)
        places = [place for place, each in enumerate(outputs) if _is_same(each, parked.top_k_index_TK)]
        if places:
            index_at = places[0] if isinstance(call.output, tuple) else None
            return _asked(call, parked, names, is_block=False, index_at=index_at)
    for call in reversed(watch.running):
        if call.name and experts.startswith(f"{call.name}."):
            site = _asked(call, parked, names, is_block=True, index_at=None)
            if site is not None:
                return site
    return None


def _asked(
    call: _Call, parked: Parked, names: Mapping[int, str], *, is_block: bool, index_at: int | None
) -> RouterSite | None:
    """How to repeat the call with other hidden states; None where it needs more than these."""
    hidden_at: int | str | None = None
    given: dict[int | str, Any] = {}
    everything: list[tuple[int | str, Any]] = [*enumerate(call.arguments), *call.keywords.items()]
    for place, value in everything:
        if hidden_at is None and _is_same(value, parked.hidden_TH):
            hidden_at, given[place] = place, None
        elif not isinstance(value, torch.Tensor) and not _holds_tensors(value):
            given[place] = value
        elif id(value) in names:
            given[place] = FromModel(name=names[id(value)])
        else:
            return None
    if hidden_at is None:
        return None
    hidden = call.arguments[hidden_at] if isinstance(hidden_at, int) else call.keywords[hidden_at]
    return RouterSite(
        module=call.name,
        is_block=is_block,
        hidden_at=hidden_at,
        hidden_dims=hidden.dim(),
        hidden_size=hidden.shape[-1],
        dtype=hidden.dtype,
        arguments=tuple(given[place] for place in range(len(call.arguments))),
        keywords={place: value for place, value in given.items() if isinstance(place, str)},
        index_at=index_at,
    )


def _is_same(value: Any, tensor: torch.Tensor) -> bool:
    """Whether it is the tensor, perhaps seen in another shape."""
    return isinstance(value, torch.Tensor) and (
        value is tensor
        or (value.numel() == tensor.numel() and value.untyped_storage()._cdata == tensor.untyped_storage()._cdata)
    )


def _holds_tensors(value: Any) -> bool:
    """Whether a container, a cache or another object brings tensors along."""
    return not isinstance(value, (type(None), bool, int, float, str))
