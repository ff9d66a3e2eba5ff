"""The dense weights of each decoder layer that can be read as they lie on disk, and taking them out of the model.

A parameter can be streamed where the checkpoint's bytes are its bytes: one plain tensor that transformers only renames, of
the dtype and shape in which the model computes, and no other module's parameter as well. All others, and buffers, stay in
memory. What a layer's experts need is ``model.layout``'s.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from poise.model.checkpoint import TensorRef
from poise.model.inspect import DTYPE_OF_SAFETENSORS, ExpertsModule
from poise.model.layout import CheckpointLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """One decoder layer in the model. ``parts``: its parameters that can be streamed, by their full names.

    ``moe_layer``: position of the MoE layer that it leads to, its own or the next; behind the last it is their number.
    """

    name: str
    moe_layer: int
    parts: Mapping[str, TensorRef]

    @property
    def nbytes(self) -> int:
        """Bytes of these parameters, as on disk so in memory."""
        return sum(part.nbytes for part in self.parts.values())


def find_decoder_layers(
    model: Any,
    modules: Sequence[ExpertsModule],
    layout: CheckpointLayout,
    dtype: torch.dtype,
    *,
    kept: Collection[str] = (),
) -> list[DecoderLayer]:
    """All layers of the list in which the experts' layers are, in their order. The model may lie on the meta device.

    ``kept``: parameters that are no part of any, as they must be there outside their layer's turn.
    """
    place = re.match(r"(.*?)\.\d+\.", modules[0].name)
    assert place is not None, f"{modules[0].name} is in no list of layers"
    names = [f"{place[1]}.{key}" for key, _ in model.get_submodule(place[1]).named_children()]
    model.tie_weights()
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    sources = _unchanged(model, layout)
    kept_wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)) or r"(?!)")
    found = []
    for name in names:
        parts = {}
        for key, parameter in model.get_submodule(name).named_parameters():
            full = f"{name}.{key}"
            source = sources.get(full)
            if (
                source is not None
                and full not in kept
                and source.nbytes
                and holders[id(parameter)] == 1
                and DTYPE_OF_SAFETENSORS.get(source.dtype) == parameter.dtype
                and source.shape == tuple(parameter.shape)
                and source.offset % parameter.dtype.itemsize == 0
                and not kept_wide.search(full)
            ):
                parts[full] = source
        moe_layer = sum(module.layer < int(name.rpartition(".")[2]) for module in modules)
        found.append(DecoderLayer(name=name, moe_layer=moe_layer, parts=parts))
    return found


def _unchanged(model: Any, layout: CheckpointLayout) -> dict[str, TensorRef]:
    """The tensors that alone, and at most renamed, are a parameter, by the parameter's name."""
    renamings = [entry for entry in layout.conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in layout.conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, TensorRef] = {}
    several: set[str] = set()
    for name, stored in layout.dense.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target in found or pattern is not None or not isinstance(stored, TensorRef):
            several.add(target)
        else:
            found[target] = stored
    return {target: ref for target, ref in found.items() if target not in several}


def take_out(model: nn.Module, names: Iterable[str]) -> None:
    """Unregisters parameters of the meta model, so that loading neither wants nor makes them."""
    for name in names:
        module, key = _owner(model, name)
        meta = module._parameters.pop(key)
        object.__setattr__(module, key, meta)


def put_back(model: nn.Module, names: Iterable[str]) -> None:
    """Registers them again, still on the meta device: each has its shape and no memory."""
    for name in names:
        module, key = _owner(model, name)
        meta = vars(module).pop(key)
        module._parameters[key] = nn.Parameter(meta.detach(), requires_grad=False)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
