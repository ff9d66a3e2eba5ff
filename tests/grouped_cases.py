"""A layer's experts in slots of a rank's memory, replicas in other memory, and rows that want them: for grouped products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from poise.model.layout import Weights
from poise.parallel.grouped_experts import Grouped, Groups, run_grouped

EXPERTS, HIDDEN, INNER = 9, 64, 32
SLOT_ELEMENTS = 3 * HIDDEN * INNER + 32
"""A little more than an expert."""


def experts_module() -> Any:
    with torch.device("meta"):
        return Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, hidden_act="silu")
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """``held``: the experts of a rank. ``experts_MK``: those that rows want of it, and E for others."""

    module: Any
    held: dict[int, Weights]
    rows_MH: torch.Tensor
    experts_MK: torch.Tensor
    weights_MK: torch.Tensor

    def run(self) -> Grouped:
        groups = Groups.of(self.module, self.held, self.rows_MH.device)
        return run_grouped(self.module, self.rows_MH, self.experts_MK, self.weights_MK, groups)

    def one_by_one(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In fp32, and the sum of the magnitudes of all that is added up, for tolerances."""
        wanted_MH, size_MH = torch.zeros(2, *self.rows_MH.shape, device=self.rows_MH.device)
        for expert, weights in self.held.items():
            (up_NH,), (down_HI,) = weights["gate_up_proj"], weights["down_proj"]
            weight_M = self.weights_MK.where(self.experts_MK == expert, 0.0).sum(dim=1)
            gate_MI, up_MI = (self.rows_MH.double() @ up_NH.double().t()).chunk(2, dim=1)
            inner_MI = torch.nn.functional.silu(gate_MI) * up_MI * weight_M[:, None]
            wanted_MH += (inner_MI @ down_HI.double().t()).float()
            size_MH += (inner_MI.abs() @ down_HI.double().abs().t()).float()
        return wanted_MH, size_MH


def in_slot(slots: torch.Tensor, slot: int) -> Weights:
    """Views of an expert's matrices; ``slots``: SLOT_ELEMENTS each."""
    run, size = slots[slot], 2 * INNER * HIDDEN
    return {
        "gate_up_proj": (run[:size].view(2 * INNER, HIDDEN),),
        "down_proj": (run[size : size + HIDDEN * INNER].view(HIDDEN, INNER),),
    }


def layer_of(
    seed: int, *, slots: int, replicas: int, tokens: int, top_k: int, absent: int = 0, device: str = "cpu"
) -> Layer:
    """Experts in any of ``slots`` and, ``replicas`` of them, in other memory; ``absent`` ones are on other ranks."""
    generator = torch.Generator().manual_seed(seed)
    here = torch.randperm(EXPERTS, generator=generator)[absent:].tolist()
    held: dict[int, Weights] = {}
    for experts, count in ((here[replicas:], slots), (here[:replicas], replicas)):
        memory = torch.randn(count, SLOT_ELEMENTS, generator=generator).bfloat16().to(device)
        places = torch.randperm(count, generator=generator)[: len(experts)].tolist()
        held |= {expert: in_slot(memory, slot) for expert, slot in zip(experts, places, strict=True)}
    wants_MK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    here_E = torch.tensor([expert if expert in held else EXPERTS for expert in range(EXPERTS)])
    return Layer(
        module=experts_module(),
        held=held,
        rows_MH=torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(device),
        experts_MK=here_E[wants_MK].to(device),
        weights_MK=torch.rand(tokens, top_k, generator=generator).to(device),
    )
