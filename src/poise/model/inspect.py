"""What transformers says a checkpoint is: the model on the meta device, and its experts modules.

No table of architectures: the class, its parameters and its shapes come from transformers' own model, built without
memory. A class whose experts neither go through transformers' registry of experts functions nor have a wrapper
(``model.wrapped_experts``) is refused here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint
from poise.model.quantisation import stated_dtype
from poise.model.wrapped_experts import wrap_experts

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_OF_SAFETENSORS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_EXPERTS_CLASS = re.compile(r"(Experts|MoE|Moe|MoA)$")
"""How transformers names a class of experts, or of the block around them."""
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""How configurations name the experts that a token chooses; a class with another name is found out by running it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsModule:
    """One MoE layer's experts in the model. ``params`` are its parameters with one slice per expert along dim 0.

    ``is_flat``: on disk a parameter's experts lie one below the other in one matrix, not stacked along a dimension of their
    own. ``num_idle``: experts without compute, for which a checkpoint may hold tensors behind those of the real ones.
    """

    name: str
    layer: int
    num_experts: int
    params: tuple[str, ...]
    is_flat: bool = False
    num_idle: int = 0


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration object. Raises CheckpointError for a model type it does not know."""
    try:
        return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} is not one that transformers knows: {reason}"
        ) from None


def choose_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """``auto`` is the dtype of most of the checkpoint's bytes. Raises CheckpointError for a dtype Poise does not run."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r} is not supported; choose auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    bytes_by_dtype: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        bytes_by_dtype[tensor.dtype] = bytes_by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    most = max(bytes_by_dtype, key=lambda name: bytes_by_dtype[name])
    if most not in DTYPE_OF_SAFETENSORS:
        raise CheckpointError(f"{checkpoint.path} holds {most} weights; Poise runs {', '.join(DTYPE_OF_SAFETENSORS)}")
    return DTYPE_OF_SAFETENSORS[most]


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the checkpoint's weights, or the one that a quantised checkpoint says to run in. Raises CheckpointError."""
    return choose_dtype(checkpoint, "auto" if checkpoint.scheme is None else stated_dtype(checkpoint.config))


def build_meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model on the meta device: shapes and names, no memory; experts outside the registry wrapped.

    Raises CheckpointError for a model type that is no causal language model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except ValueError as error:
        raise CheckpointError(
            f"model type {config.model_type!r} is no causal language model: {str(error)[:120]}"
        ) from None
    except (RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"config.json describes no model that can be built: {reason}") from None
    wrap_experts(model)
    return model


def find_experts(model: nn.Module, model_type: str) -> list[ExpertsModule]:
    """All experts modules that go through transformers' registry, or through a wrapper, in order of layer.

    Raises CheckpointError when there are none: either the model is dense, or its class keeps its experts to itself.
    """
    found: list[ExpertsModule] = []
    outside: str | None = None
    for name, module in model.named_modules():
        num_experts = getattr(module, "num_experts", None)
        if goes_through_registry(module) and isinstance(num_experts, int):
            params = tuple(
                key
                for key, value in module.named_parameters(recurse=False)
                if value.dim() and value.shape[0] == num_experts
            )
            found.append(
                ExpertsModule(
                    name=name,
                    layer=_layer_id(name),
                    num_experts=num_experts,
                    params=params,
                    is_flat=getattr(module, "is_flat", False),
                    num_idle=getattr(module, "num_idle", 0),
                )
            )
        elif _EXPERTS_CLASS.search(type(module).__name__):
            outside = outside or type(module).__name__
    if not found and outside:
        raise CheckpointError(
            f"model type {model_type!r} keeps its experts ({outside}) outside transformers' registry of experts functions; "
            "not supported: choose one that docs/models.md lists as exact"
        )
    if not found:
        raise CheckpointError(f"model type {model_type!r} has no experts; Poise runs mixture-of-experts models")
    _check_top_k(getattr(model, "config", None), found)
    return sorted(found, key=lambda experts: experts.layer)


def _check_top_k(config: Any, modules: Sequence[ExpertsModule]) -> None:
    """Raises CheckpointError where a token is to choose no expert, or more than a layer has."""
    text = config.get_text_config() if config is not None else None
    most = min(module.num_experts + module.num_idle for module in modules)
    for name in _TOP_K_NAMES:
        top_k = stated(text, name)
        if isinstance(top_k, int) and not 1 <= top_k <= most:
            raise CheckpointError(
                f"{name} in config.json is {top_k}; the model has {most} experts in a layer: it must be 1 to {most}"
            )


def stated(config: Any, name: str) -> Any:
    """A value of a transformers configuration; None where it has none, or one for each layer (Dots3)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def goes_through_registry(module: nn.Module) -> bool:
    """Whether ``use_experts_implementation`` of transformers, or a wrapper of Poise, leads the module to ``model.seam``."""
    return all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def _layer_id(name: str) -> int:
    """The first number in a module's path: its decoder layer."""
    return next(int(part) for part in name.split(".") if part.isdigit())
