"""Why a model's output holds NaN or infinity: looked into only when it has happened, so that it costs nothing before."""

from __future__ import annotations

from typing import Any

import torch

from poise.model.arena import Arena
from poise.model.int4 import Int4Weight
from poise.model.weights import Packed, converted_nbytes, unpack
from poise.offload.expert_store import ExpertStore


def cause_of_not_finite(model: Any, store: ExpertStore) -> str:
    """What is wrong and what to do, in words: names the weight, if it is one that is in memory."""
    name = _damaged_weight(model, store)
    if name is not None:
        return f"{name} holds NaN or infinite weights; fetch the checkpoint again"
    return (
        f"no weight in memory holds NaN or infinity, so an expert that has left it does, or {model.dtype} is too narrow "
        "for this model; fetch the checkpoint again, or give dtype float32"
    )


def _damaged_weight(model: Any, store: ExpertStore) -> str | None:
    for name, weight in model.named_parameters():
        if not weight.is_meta and not _is_finite(weight):
            return f"tensor {name}"
    for source, held in store.residents():
        weights = unpack(held, Arena(1, converted_nbytes(source)), 0) if isinstance(held, Packed) else held
        for name, parts in weights.items():
            tensors = (parts.scale_zero_GN2,) if isinstance(parts, Int4Weight) else parts
            if not all(map(_is_finite, tensors)):
                return f"{name} of expert {source.expert} in {source.module}"
    return None


def _is_finite(weight: torch.Tensor) -> bool:
    return bool(weight.isfinite().all())
