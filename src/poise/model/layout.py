"""Where each expert lies on disk, and how its bytes become the parameters that the model expects.

transformers' own conversion mapping says which tensors of a checkpoint make up which parameter. It is applied here to one
expert at a time: where the conversion only stacks experts and puts gate above up (nearly every model), an expert's bytes
are used as they lie; any other chain of operations is run by transformers itself on that expert's slice alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, TensorRef
from poise.model.inspect import DTYPE_OF_SAFETENSORS, ExpertsModule
from poise.model.int4 import Int4Weight
from poise.model.scaled import Int4Ref, Scaled, Stored, on_disk, slice_of, stored_tensors

Weights = dict[str, tuple[torch.Tensor, ...] | Int4Weight]
"""An expert's parameters by name; the parts of one parameter lie below each other along dim 0. A 4-bit matrix is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamRecipe:
    """How one parameter of one expert is made from ``parts``.

    ``converter`` is None when the parts, one below the other, are the parameter. Otherwise ``patterns`` names the
    converter's source pattern of each part.
    """

    param: str
    parts: tuple[Stored, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSource:
    """One expert on disk. ``shapes`` are the shapes of its parameters in the model, without the expert dimension.

    ``stays_packed``: its bytes, where they are quantised, are kept in memory as they are and made into weights at each use.
    ``int4``: its matrices, biases with them, where it lies in the 4-bit store; there are no recipes then. ``crc32`` is that of
    its bytes, from the first to the last, where it is known.
    """

    module: str
    layer: int
    expert: int
    recipes: tuple[ParamRecipe, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    stays_packed: bool = True
    int4: Mapping[str, Int4Ref] = field(default_factory=dict)
    crc32: int | None = None

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Every slice of the disk this expert needs, each once."""
        in_recipes = (ref for recipe in self.recipes for part in recipe.parts for ref in on_disk(part))
        return tuple(dict.fromkeys([*in_recipes, *(ref for matrix in self.int4.values() for ref in matrix.refs)]))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts)

    @property
    def is_direct(self) -> bool:
        """Whether the bytes on disk are the weights, with nothing to convert, and where a tensor may begin."""
        return all(
            recipe.converter is None
            and all(
                isinstance(part, TensorRef)
                and DTYPE_OF_SAFETENSORS.get(part.dtype) == self.dtype
                and part.offset % self.dtype.itemsize == 0
                for part in recipe.parts
            )
            for recipe in self.recipes
        )

    @property
    def is_quantised(self) -> bool:
        """Whether the bytes on disk are quantised and become weights part by part, with nothing else to convert."""
        return all(recipe.converter is None for recipe in self.recipes) and any(
            isinstance(part, Scaled) for recipe in self.recipes for part in recipe.parts
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointLayout:
    """``experts_LE[l][e]`` is expert e of the l-th MoE layer; ``dense`` are all other tensors by name."""

    experts_LE: tuple[tuple[ExpertSource, ...], ...]
    dense: Mapping[str, Stored]
    conversions: tuple[Any, ...]

    def unpacked(self) -> CheckpointLayout:
        """The same experts, made into weights once, when they arrive in memory."""
        rows = (tuple(replace(source, stays_packed=False) for source in row) for row in self.experts_LE)
        return replace(self, experts_LE=tuple(rows))


@dataclass(slots=True)
class _Collected:
    """The checkpoint tensors that flow into one parameter, by source pattern, in natural order."""

    converter: WeightConverter | None
    by_pattern: dict[str, list[Stored]]


def find_layout(
    checkpoint: Checkpoint, model: Any, modules: Sequence[ExpertsModule], dtype: torch.dtype
) -> CheckpointLayout:
    """Maps every tensor of the checkpoint to the model. ``model`` lies on the meta device, experts included.

    Raises CheckpointError when an expert's tensor is missing or has another shape than the model's.
    """
    conversions = tuple(get_model_conversion_mapping(model))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_source = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    expert_params = {f"{module.name}.{param}" for module in modules for param in module.params}
    collected: dict[str, _Collected] = {}
    dense: dict[str, Stored] = {}
    tensors = stored_tensors(checkpoint)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target in state and state[target].is_floating_point():
            _check_dtype(tensors[name])
        if target not in expert_params:
            dense[name] = tensors[name]
            continue
        converter = by_source[pattern] if pattern is not None else None
        entry = collected.setdefault(target, _Collected(converter=converter, by_pattern={}))
        entry.by_pattern.setdefault(pattern or name, []).append(tensors[name])
    experts_LE = tuple(
        tuple(_expert_source(module, expert, collected, state, dtype) for expert in range(module.num_experts))
        for module in modules
    )
    return CheckpointLayout(experts_LE=experts_LE, dense=dense, conversions=conversions)


def _check_dtype(stored: Stored) -> None:
    """Raises CheckpointError for a tensor that is no weights as it is: quantised by a method that config.json does not say."""
    if isinstance(stored, TensorRef) and stored.dtype not in (*DTYPE_OF_SAFETENSORS, "F64"):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} is {stored.dtype}, which Poise does not read as weights without a "
            "quantization_config of MXFP4 or fp8; use a checkpoint in bf16, fp16, fp32, MXFP4 or block-scaled fp8"
        )


def _expert_source(
    module: ExpertsModule,
    expert: int,
    collected: Mapping[str, _Collected],
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> ExpertSource:
    shapes = {param: tuple(state[f"{module.name}.{param}"].shape[1:]) for param in module.params}
    recipes = []
    made: set[str] = set()
    for param in module.params:
        entry = collected.get(f"{module.name}.{param}")
        if entry is None:
            continue
        recipe = _recipe(param, entry, module, expert)
        made |= _filled_by(param, entry, module)
        if recipe.converter is None:
            _check_shape(recipe, shapes[param])
        recipes.append(recipe)
    missing = [param for param in module.params if param not in made]
    if missing:
        raise CheckpointError(
            f"the checkpoint holds nothing for {module.name}.{missing[0]}; fetch the missing shard again"
        )
    return ExpertSource(
        module=module.name, layer=module.layer, expert=expert, recipes=tuple(recipes), shapes=shapes, dtype=dtype
    )


def _filled_by(param: str, entry: _Collected, module: ExpertsModule) -> set[str]:
    """The module's parameters that one conversion fills: itself, and more where one tensor is split into several."""
    patterns = (
        [pattern.replace("\\", "").rstrip("$") for pattern in entry.converter.target_patterns]
        if entry.converter
        else []
    )
    return {param} | {other for other in module.params if any(pattern.endswith(other) for pattern in patterns)}


def _recipe(param: str, entry: _Collected, module: ExpertsModule, expert: int) -> ParamRecipe:
    patterns = list(entry.by_pattern) if entry.converter is None else entry.converter.source_patterns
    parts: list[Stored] = []
    named: list[str] = []
    for pattern in patterns:
        if pattern in entry.by_pattern:
            parts.append(_slice_of(entry.by_pattern[pattern], module, param, expert))
            named.append(pattern)
    converter = entry.converter
    if converter is None or _only_stacks(converter):
        return ParamRecipe(param=param, parts=tuple(parts))
    return ParamRecipe(param=param, parts=tuple(parts), patterns=tuple(named), converter=converter)


def _only_stacks(converter: WeightConverter) -> bool:
    """Whether the conversion stacks experts along dim 0 and, at most, puts their matrices one below the other."""
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    return len(kinds) == len(converter.operations) and kinds in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    )


def _slice_of(stored: list[Stored], module: ExpertsModule, param: str, expert: int) -> Stored:
    """The part of one source that belongs to one expert: a tensor of its own, or a slice of a fused one."""
    stored = _of_real_experts(stored, module)
    if len(stored) == module.num_experts and len(stored) > 1:
        return stored[expert]
    fused = stored[0]
    if len(stored) != 1 or not fused.shape or fused.shape[0] != module.num_experts:
        if len(stored) > 1:
            raise CheckpointError(
                f"{module.name}.{param}: {len(stored)} experts on disk, {module.num_experts} in config.json; they must agree"
            )
        raise CheckpointError(
            f"tensor {fused.name} has shape {list(fused.shape)}; config.json asks for {module.num_experts} experts along dim 0"
        )
    return slice_of(fused, expert)


def _of_real_experts(stored: list[Stored], module: ExpertsModule) -> list[Stored]:
    """The tensors without those of idle experts (LongCat), and a flat matrix seen as stacked experts (DBRX)."""
    if module.num_idle and len(stored) == module.num_experts + module.num_idle:
        return stored[: module.num_experts]
    flat = stored[0]
    if module.is_flat and isinstance(flat, TensorRef) and flat.shape and flat.shape[0] % module.num_experts == 0:
        rows, *rest = flat.shape
        return [replace(flat, shape=(module.num_experts, rows // module.num_experts, *rest))]
    return stored


def _check_shape(recipe: ParamRecipe, shape: tuple[int, ...]) -> None:
    rows = sum(part.shape[0] for part in recipe.parts if part.shape)
    if rows != shape[0] or {part.shape for part in recipe.parts} != {(rows // len(recipe.parts), *shape[1:])}:
        found = " and ".join(f"{part.name} {list(part.shape)}" for part in recipe.parts)
        raise CheckpointError(
            f"{found}: config.json asks for {list(shape)} in all; the checkpoint and its config.json do not match"
        )


def convert_expert(
    source: ExpertSource, raw: Mapping[Stored, torch.Tensor], model: Any, config: Any
) -> dict[str, torch.Tensor]:
    """Runs the conversions of one expert. ``raw`` holds the parts, dequantised.

    Returns every parameter in the model's shape and dtype.
    """
    made: dict[str, torch.Tensor] = {}
    for recipe in source.recipes:
        tensors = [raw[part] for part in recipe.parts]
        if recipe.converter is None:
            made[recipe.param] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            continue
        converter = copy.deepcopy(recipe.converter)
        stacks = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
        for pattern, tensor in zip(recipe.patterns, tensors, strict=True):
            converter.collected_tensors[pattern] = [tensor if stacks else tensor.unsqueeze(0)]
        result = converter.convert(f"{source.module}.{recipe.param}", model=model, config=config)
        for name, value in result.items():
            tensor = value[0] if isinstance(value, list) else value
            made[name.rsplit(".", 1)[-1]] = tensor.squeeze(0)
    for param, shape in source.shapes.items():
        if tuple(made[param].shape) != shape:
            found = f"{source.module}.{param} of expert {source.expert} becomes {list(made[param].shape)}"
            raise CheckpointError(f"{found}, not {list(shape)}; the checkpoint and its config.json do not match")
    return {param: made[param].to(source.dtype) for param in source.shapes}
