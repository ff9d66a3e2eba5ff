"""A model's cache, made as transformers' ``generate`` makes it, and what it allows rows that run together to be.

Left padding and prompts in chunks are exact in transformers for nearly every class. Where they are not, plain transformers
itself differs between a padded batch and its rows alone, or between a prompt in one piece and in two; such models run with
rows of equal length, or with whole prompts. ``tests/parity/test_registry.py`` holds every class to these rules, and every
exception to its cause.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from poise.errors import CheckpointError
from poise.model.grown_cache import GrownLayer

WHOLE_PROMPTS = {
    "jamba": "its state-space layers begin anew in every pass of more than one token",
}
"""Model types whose prompts must not be cut into chunks, and why."""

_GENERAL_LAYERS = "transformers.cache_utils"
"""Cache layers defined here are positions or recurrent states. A model's own kinds (DeepSeek-V4, MiniMax-M3) compress or
block their keys on a grid that counts from the first slot, so that padding shifts every block."""


def make_cache(model: Any) -> Any:
    """An empty cache. Raises CheckpointError for a class whose cache cannot be made from outside."""
    if _has_own_cache(model):
        return _own_cache_class(model)()
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def keep_in_place(model: Any, cache: Any, *, final_tokens: int) -> None:
    """Has an empty cache's attention layers lie in one place each, for rows of at most ``final_tokens`` tokens."""
    for place in movable_layers(model, cache):
        cache.layers[place] = GrownLayer(final_tokens)


def drop_rows(cache: Any, keep: torch.Tensor, num_rows: int) -> None:
    """Leaves the rows at the indices ``keep`` (int64) of ``num_rows`` in the cache, in that order.

    Some classes' ``reorder_cache`` forgets states of their own (MiniMax; in transformers 5.17 DeepSeek-V4 and Qwen4): a
    tensor that it left as it was, with a row for every row, is cut here.
    """
    others = [layer for layer in cache.layers if not isinstance(layer, GrownLayer)]
    states = [vars(cache), *map(vars, others)]
    before = [tensor for each in states for tensor in tensors_in(each)]
    cache.reorder_cache(keep)
    untouched = {id(tensor) for tensor in before}
    for each in states:
        _cut_untouched(each, untouched, keep, num_rows)


def tensors_in(states: Mapping[Any, Any] | Sequence[Any]) -> Iterator[torch.Tensor]:
    """Every tensor in the attributes of a cache or of one of its layers, lists and dicts of tensors included."""
    for _, value in _entries(states):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from tensors_in(value)


def _cut_untouched(states: Any, untouched: set[int], keep: torch.Tensor, num_rows: int) -> None:
    for name, value in _entries(states):
        if isinstance(value, (dict, list)):
            _cut_untouched(value, untouched, keep, num_rows)
        elif isinstance(value, torch.Tensor) and id(value) in untouched:
            # Positions may have a leading dimension for time, height and width.
            rows_dim = value.dim() - 2 if str(name).endswith("position_ids") else 0
            if value.dim() > rows_dim >= 0 and value.shape[rows_dim] == num_rows:
                states[name] = value.index_select(rows_dim, keep)


def _entries(states: Mapping[Any, Any] | Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(states.items() if isinstance(states, Mapping) else enumerate(states))


def needs_equal_rows(model: Any) -> bool:
    """Whether the rows of a batch must be of one length, because the class does not allow padding."""
    return _has_own_cache(model) or any(not _is_general(layer) for layer in make_cache(model).layers)


def needs_whole_prompts(model: Any) -> bool:
    """Whether a prompt must run in one pass."""
    return _has_own_cache(model) or model.config.get_text_config(decoder=True).model_type in WHOLE_PROMPTS


def movable_layers(model: Any, cache: Any) -> list[int]:
    """The layers of a cache that are plain keys and values of all positions and that no other layer reads.

    Windows, indexers, compressed and recurrent states are not among them.
    """
    config = model.config.get_text_config(decoder=True)
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if getattr(config, "num_kv_shared_layers", 0) or any("reuse" in str(mode) for mode in modes):
        return []
    return [place for place, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]


def _has_own_cache(model: Any) -> bool:
    """Whether ``generate`` leaves the cache to the model. Such a cache (MiniMax) may not know how many tokens it holds."""
    return not model._supports_default_dynamic_cache()


def _is_general(layer: object) -> bool:
    return type(layer).__module__ == _GENERAL_LAYERS


def _own_cache_class(model: Any) -> type[Cache]:
    """The class that the model's forward says it takes: such models check it, and make one themselves where none is given."""
    parameter = inspect.signature(model.base_model.forward).parameters.get("past_key_values")
    for kind in typing.get_args(parameter.annotation) if parameter else ():
        if isinstance(kind, type) and issubclass(kind, Cache) and kind is not Cache:
            return kind
    raise CheckpointError(
        f"model type {model.config.model_type!r} generates with a cache of its own that Poise cannot make; not supported"
    )
