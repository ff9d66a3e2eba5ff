"""The arithmetic of one expert, as transformers' experts functions define it, over weights that lie anywhere.

Weights of one parameter may come in several parts, one below the other (gate and up read from different places): each
part is multiplied into its own columns of the result, nothing is copied together.
"""

from __future__ import annotations

from typing import Any

import torch

from poise.model.int4 import Int4Weight, int4_linear, is_made_bf16
from poise.model.layout import Weights
from poise.model.wide import is_wide, wide_linear


def padded_rows(rows: int, dtype: torch.dtype, weights: Weights) -> int:
    """Rows to compute so that few distinct shapes occur: powers of two to 16, then steps of at most a quarter.

    For bf16 and fp16 on a CPU oneDNN compiles a kernel for every new row count and keeps it: half a millisecond and 0.3 MB
    each, outside any budget. fp32 products (also of bf16 matrices made fp32) and 4-bit ones have no such kernels.
    """
    if dtype == torch.float32 or rows <= 1 or not any(_is_compiled(rows, dtype, each) for each in weights.values()):
        return rows
    if is_wide(rows, dtype, torch.device("cpu")):
        return rows
    step = max(16, 1 << (rows - 1).bit_length() - 3) if rows > 16 else 1 << (rows - 1).bit_length()
    return -(-rows // step) * step


def _is_compiled(rows: int, dtype: torch.dtype, weight: tuple[torch.Tensor, ...] | Int4Weight) -> bool:
    return not isinstance(weight, Int4Weight) or is_made_bf16(rows, dtype, weight)


def expert_forward(module: Any, rows_TH: torch.Tensor, weights: Weights, routing_T1: torch.Tensor) -> torch.Tensor:
    """One expert over its tokens, times their routing weights. Shapes: rows_TH and routing_T1 to (T, H).

    Honours the module's ``has_gate``, ``has_bias``, ``is_transposed``, ``_apply_gate``, the norm behind each expert where it
    has one, and what ``model.wrapped_experts`` adds: weights on the input, arithmetic of its own.
    """
    if getattr(module, "scales_input", False):
        return _unweighted(module, (rows_TH * routing_T1).to(rows_TH.dtype), weights)
    return _unweighted(module, rows_TH, weights) * routing_T1


def _unweighted(module: Any, rows_TH: torch.Tensor, weights: Weights) -> torch.Tensor:
    own = getattr(module, "expert_forward", None)
    if own is not None:
        out_TH: torch.Tensor = own(rows_TH, weights)
        return out_TH
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    rows = rows_TH
    if is_wide(len(rows_TH), rows_TH.dtype, rows_TH.device) and _is_bf16(weights[up_name]):
        rows = rows_TH.float()
    up_TI = _linear(rows, weights, up_name, module)
    inner_TI = module._apply_gate(up_TI) if module.has_gate else module.act_fn(up_TI)
    out_TH = _linear(inner_TI, weights, "down_proj", module).to(rows_TH.dtype)
    if getattr(module, "has_post_expert_norm", False):
        out_TH = module.post_expert_norm(out_TH)
    return out_TH


def _linear(rows: torch.Tensor, weights: Weights, name: str, module: Any) -> torch.Tensor:
    parts = weights[name]
    if isinstance(parts, Int4Weight):
        return int4_linear(rows, parts)
    bias = _whole(weights[f"{name}_bias"]) if module.has_bias else None
    if rows.dtype != parts[0].dtype:
        return _wide(rows, parts, bias, is_transposed=module.is_transposed)
    if module.is_transposed:
        weight = _whole(parts)
        return torch.addmm(bias, rows, weight) if bias is not None else torch.mm(rows, weight)
    if len(parts) == 1:
        return torch.nn.functional.linear(rows, parts[0], bias)
    result = rows.new_empty(rows.shape[0], sum(part.shape[0] for part in parts))
    begin = 0
    for part in parts:
        torch.mm(rows, part.t(), out=result[:, begin : begin + part.shape[0]])
        begin += part.shape[0]
    return result if bias is None else result.add_(bias)


def _wide(
    rows: torch.Tensor, parts: tuple[torch.Tensor, ...], bias: torch.Tensor | None, *, is_transposed: bool
) -> torch.Tensor:
    """fp32 rows by bf16 matrices."""
    if is_transposed:
        result = wide_linear(rows, _whole(parts).t())
    else:
        result = rows.new_empty(rows.shape[0], sum(part.shape[0] for part in parts))
        begin = 0
        for part in parts:
            wide_linear(rows, part, result[:, begin : begin + part.shape[0]])
            begin += part.shape[0]
    return result if bias is None else result.add_(bias)


def _is_bf16(parts: tuple[torch.Tensor, ...] | Int4Weight) -> bool:
    return not isinstance(parts, Int4Weight) and parts[0].dtype == torch.bfloat16


def _whole(parts: tuple[torch.Tensor, ...] | Int4Weight) -> torch.Tensor:
    assert not isinstance(parts, Int4Weight), "a 4-bit matrix brings its bias with it"
    return parts[0] if len(parts) == 1 else torch.cat(parts)
