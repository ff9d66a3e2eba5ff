"""Experts outside transformers' registry, given the registry's contract, so that they park like all others.

A wrapper replaces one forward, of the experts or of the block around them, by one that calls ``model.seam.park`` with hidden
states, chosen experts and their weights, and puts the registry's marks (``num_experts``, ``has_gate``, ``has_bias``,
``is_transposed``, ``_apply_gate``) on the module that holds the parameters. Beyond these there are

- ``scales_input``: the routing weight multiplies an expert's input, not its output;
- ``expert_forward(rows_TH, weights)``: the arithmetic, where matrices are not called and placed as usual;
- ``is_flat``: on disk the experts lie one below the other in one matrix, not stacked;
- ``num_idle``: experts without weights behind the real ones, for which a checkpoint may hold unused tensors.

Models are wrapped on the meta device. Classes that are neither wrapped nor in the registry are refused (``model.inspect``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from poise.model.seam import park


def wrap_experts(model: nn.Module) -> None:
    """Gives every experts module of a class named in ``WRAPPERS`` the registry's contract, in place."""
    for module in list(model.modules()):
        wrap = WRAPPERS.get(type(module).__name__)
        if wrap is not None:
            wrap(module)


def _mark(experts: Any, num_experts: int, *, is_transposed: bool) -> None:
    """The registry's marks of gated experts without biases."""
    experts.num_experts = num_experts
    experts.has_gate, experts.has_bias, experts.is_transposed = True, False, is_transposed
    experts._apply_gate = MethodType(_apply_gate, experts)


def _apply_gate(experts: Any, gate_up_TI: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    gated: torch.Tensor = experts.act_fn(gate_TI) * up_TI
    return gated


def _wrap_llama4(block: Any) -> None:
    """``Llama4TextMoe``. The router scores every expert, zero where not chosen; the score scales the expert's input."""
    _mark(block.experts, block.num_experts, is_transposed=True)
    block.experts.scales_input = True
    block.forward = MethodType(_llama4_forward, block)


def _llama4_forward(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_TH = hidden_states.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(hidden_TH)
    index_TK = logits_TE.topk(block.top_k, dim=1).indices
    output_TH = park(block.experts, hidden_TH, index_TK, scores_TE.gather(1, index_TK))
    return block.shared_expert(hidden_TH) + output_TH, logits_TE


def _wrap_dbrx(experts: Any) -> None:
    """``DbrxExperts``. The parameters lie in ``experts.mlp``, all experts of a layer in one matrix."""
    glu = experts.mlp
    _mark(glu, experts.num_experts, is_transposed=False)
    glu.is_flat = True
    glu.expert_forward = MethodType(_dbrx_expert_forward, glu)
    for name in ("w1", "v1", "w2"):
        flat = getattr(glu, name)
        setattr(glu, name, nn.Parameter(flat.detach().view(experts.num_experts, -1, flat.shape[1])))
    experts.forward = MethodType(_dbrx_forward, experts)


def _dbrx_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    return park(experts.mlp, hidden_TH, top_k_index, top_k_weights).view(hidden_states.shape)


def _dbrx_expert_forward(
    glu: Any, rows_TH: torch.Tensor, weights: Mapping[str, tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    (w1_IH,), (v1_IH,), (w2_IH,) = (weights[name] for name in ("w1", "v1", "w2"))
    gated_TI = glu.activation_fn(rows_TH @ w1_IH.t()) * (rows_TH @ v1_IH.t())
    output_TH: torch.Tensor = gated_TI @ w2_IH
    return output_TH


def _wrap_longcat(experts: Any) -> None:
    """``LongcatFlashExperts``. Experts behind the last real one return their input."""
    _mark(experts, experts.num_routed_experts, is_transposed=False)
    experts.num_idle = experts.zero_expert_num
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[: experts.num_experts])
    experts.forward = MethodType(_longcat_forward, experts)


def _longcat_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    output_TH = park(experts, hidden_states, top_k_index, top_k_weights)
    share_T1 = (top_k_weights * (top_k_index >= experts.num_experts)).sum(dim=1, keepdim=True)
    kept_TH: torch.Tensor = (hidden_states * share_T1).to(hidden_states.dtype)
    return output_TH + kept_TH


WRAPPERS: dict[str, Callable[[Any], None]] = {
    "Llama4TextMoe": _wrap_llama4,
    "DbrxExperts": _wrap_dbrx,
    "LongcatFlashExperts": _wrap_longcat,
}
"""How each class outside the registry is wrapped, by class name: Poise imports no model's code."""
