"""A rank's experts, one after the other and by grouped products, as its MoE layer computes them, beside what a GPU can do.

Rows are those that come to rank 0 of 8: each token of all ranks chooses 8 of 128 experts evenly. Times are the caller's,
with everything between rows and their summed outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.gpu.layers import EXPERTS, RANKS, SHAPES, TOKENS, TOP_K, GroupedExperts, rows_for, subject_of
from benchmarks.gpu.timing import Job, device_s, host_s
from poise.model.layout import Weights
from poise.parallel.exchange import Received
from poise.parallel.grouped_experts import stacks_of
from poise.parallel.moe_layer import ExpertParallelLayers, Turn
from poise.parallel.routes import Copies, Routes

DEVICE = torch.device("cuda", 0)
FLOPS_PER_S = 790e12
"""Of bf16 products, as measured on Hopper chips."""
OWN, REPLICAS = EXPERTS // RANKS, 3
SCATTERED_SLOTS = 784
"""Of a rank of Qwen3-30B: in any of them its experts may lie when many have moved."""
COPY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """``held``: the rank's experts, ``received`` what has come for them."""

    module: Any
    held: Mapping[int, Weights]
    received: Received

    @property
    def pairs(self) -> int:
        return int((self.received.experts_MK < EXPERTS).sum())

    def layers(self, *, is_grouped: bool) -> ExpertParallelLayers:
        experts, exchange = SimpleNamespace(layer=lambda layer: self.held), SimpleNamespace(device=DEVICE)
        copies = Copies.of(np.arange(EXPERTS), num_experts=EXPERTS, num_ranks=RANKS)
        made = ExpertParallelLayers([self.module], cast(Any, experts), cast(Any, exchange), [copies], rank=0)
        made.is_grouped = is_grouped
        return made

    def job(self, *, is_grouped: bool) -> Job:
        """What the engine does between rows and outputs."""
        layers = self.layers(is_grouped=is_grouped)
        turn = Turn(
            layer=0,
            began_s=0.0,
            tokens=(),
            hidden_TH=self.received.hidden_MH,
            choice_TK=self.received.experts_MK,
            weights_TK=self.received.weights_MK,
            routes=None,
        )
        return lambda: layers.compute(turn, self.received).partial_MH


def grouped_experts() -> list[dict[str, object]]:
    """A row for each model, phase and way in which its experts lie."""
    rate = _bytes_per_s()
    rows = []
    for name in SHAPES:
        subject = subject_of(name)
        for phase, tokens in TOKENS.items():
            generator = torch.Generator().manual_seed(tokens)
            received = _received(tokens, subject.hidden, generator)
            for lie in ("together", "three replicas", "scattered"):
                if lie == "scattered" and name != min(SHAPES, key=lambda each: SHAPES[each][0]):
                    continue  # the slots of the larger model do not fit
                slots = SCATTERED_SLOTS if lie == "scattered" else OWN
                held = _held(subject.param_shapes, slots, replicas=REPLICAS if "replicas" in lie else 0)
                case = Case(module=subject.experts_module, held=held, received=received)
                rows.append({"model": name, "phase": phase, "experts": lie, **_row(case, name, rate)})
                del held, case
                torch.cuda.empty_cache()
    return rows


def _row(case: Case, name: str, bytes_per_s: float) -> dict[str, object]:
    hidden, intermediate, _ = SHAPES[name]
    counts_E = torch.bincount(case.received.experts_MK.flatten(), minlength=EXPERTS + 1)[:OWN].cpu().numpy()
    weight_bytes = int((counts_E > 0).sum()) * 6 * hidden * intermediate
    limits = weight_bytes / bytes_per_s, 6.0 * hidden * intermediate * case.pairs / FLOPS_PER_S
    loop, grouped = case.job(is_grouped=False), case.job(is_grouped=True)
    with torch.inference_mode():
        one_MH, all_MH = cast(torch.Tensor, loop()).float(), cast(torch.Tensor, grouped()).float()
        torch.cuda.reset_peak_memory_stats()
        grouped()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop()
        loop_peak = torch.cuda.max_memory_allocated()
        base = torch.cuda.memory_allocated()
        jobs, theirs = {"loop": loop, "grouped": grouped}, _transformers(case)
        times = host_s(jobs if theirs is None else {**jobs, "transformers": theirs}, rounds=20)
        products = GroupedExperts(name, OWN)
        rows_PH, ends_E = rows_for(counts_E, hidden)
        bare_s = device_s({"products": partial(products, rows_PH, ends_E)}, rounds=20)["products"]
    return {
        "rows": len(case.received.hidden_MH),
        "pairs": case.pairs,
        "loop_s": times["loop"],
        "grouped_s": times["grouped"],
        "transformers_grouped_s": times.get("transformers"),
        "bare_products_s": bare_s,
        "loop_over_grouped": times["loop"] / times["grouped"],
        "limit_s": max(limits),
        "limit_is": "weights over memory rate" if limits[0] > limits[1] else "arithmetic",
        "limit_frac": max(limits) / times["grouped"],
        "memory_bytes_per_s": bytes_per_s,
        "groups": stacks_of(case.held, "gate_up_proj")[0][-1].end,
        "largest_difference_frac": float((one_MH - all_MH).abs().max() / one_MH.abs().max()),
        "peak_bytes": peak - base,
        "loop_peak_bytes": loop_peak - base,
    }


def _transformers(case: Case) -> Job | None:
    """transformers' own function, those of other ranks as it marks them; None where experts do not lie together."""
    stacks, group_of = stacks_of(case.held, "gate_up_proj")
    if len(stacks) > 1 or len(stacks[0].up_GNH) != OWN:
        return None
    table_E = torch.full((EXPERTS + 1,), OWN, device=DEVICE)
    for expert, group in group_of.items():
        table_E[expert] = group
    module = case.module
    own = SimpleNamespace(
        num_experts=OWN,
        gate_up_proj=stacks[0].up_GNH,
        down_proj=stacks[0].down_GHI,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=True,
        _apply_gate=module._apply_gate,
        act_fn=module.act_fn,
    )
    forward = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    received = case.received
    return lambda: forward(own, received.hidden_MH, table_E[received.experts_MK], received.weights_MK)


def _received(tokens: int, hidden: int, generator: torch.Generator) -> Received:
    """Rows of ``tokens`` of each rank that want an expert of rank 0."""
    chosen_TK = torch.rand(tokens * RANKS, EXPERTS, generator=generator).topk(TOP_K).indices
    chosen_MK = chosen_TK[(chosen_TK < OWN).any(dim=1)]
    experts_MK = torch.where(chosen_MK < OWN, chosen_MK, EXPERTS).to(DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    return Received(
        hidden_MH=torch.randn(len(experts_MK), hidden, device=DEVICE).to(torch.bfloat16),
        experts_MK=experts_MK,
        weights_MK=torch.rand(experts_MK.shape, device=DEVICE) / TOP_K,
        received_R=(len(experts_MK),),
        routes=Routes(
            token_N=none,
            sent_R=(0,) * RANKS,
            pairs_R=(0,) * RANKS,
            experts_NK=none.view(0, TOP_K),
            num_experts=EXPERTS,
        ),
        waited_s=0.0,
        rows_s=0.0,
        nbytes=0,
    )


def _held(shapes: Mapping[str, tuple[int, ...]], slots: int, *, replicas: int) -> dict[int, Weights]:
    """The rank's experts in some of so many slots, the last of them (``replicas``) in other memory."""
    elements = sum(map(math.prod, shapes.values()))
    places = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[:OWN].tolist()
    homes, others = (
        torch.empty(count, elements, device=DEVICE, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for count in (slots, max(1, replicas))
    )
    held: dict[int, Weights] = {}
    for expert in range(OWN):
        is_replica = expert >= OWN - replicas
        run = others[expert - OWN + replicas] if is_replica else homes[places[expert] if slots > OWN else expert]
        parts = torch.split(run, [math.prod(shape) for shape in shapes.values()])
        held[expert] = {name: (part.view(shape),) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return held


def _bytes_per_s() -> float:
    """Read and written by a copy within the GPU."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / device_s({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
