"""What ``LLM.describe`` says, and so what `poise generate` prints: plain numbers about a model and its plan."""

from __future__ import annotations

from poise.engine.blueprint import Blueprint
from poise.plan.pipeline import PipelinePlan


def model_facts(drawn: Blueprint) -> dict[str, object]:
    """What does not change from call to call."""
    spec = drawn.spec
    facts: dict[str, object] = {
        "architecture": spec.architecture,
        "layers": spec.num_layers,
        "moe_layers": len(spec.moe_layers),
        "experts_per_layer": max(spec.experts_L),
        "top_k": spec.top_k,
        "expert_bytes": spec.expert_bytes,
        "costs": drawn.costs.source,
        "dense_bytes": spec.dense_bytes,
        "total_bytes": spec.total_bytes,
        "dtype": spec.dtype,
        "dtype_reason": drawn.dtype.reason,
        "quantize": "none" if drawn.int4 is None else "int4",
        "budget_bytes": drawn.budget_bytes,
        "base_bytes": drawn.base_bytes,
    }
    tier = drawn.tier
    if tier is not None:
        facts |= {
            "device": str(tier.device),
            "device_budget_bytes": tier.budget_bytes,
            "experts_in_dram": tier.host_slots,
            "experts": sum(spec.experts_L),
        }
    if drawn.int4 is not None:
        facts |= {"int4_store": str(drawn.int4.directory), "int4_weight_error": round(drawn.int4.weight_error, 4)}
    return facts


def plan_facts(drawn: Blueprint, plan: PipelinePlan) -> dict[str, object]:
    """How a call ran."""
    return {
        "batch_size": plan.group.batch_size,
        "num_batches": plan.group.num_batches,
        "chunk_tokens": plan.group.chunk_tokens,
        "pass_tokens": plan.group.pass_tokens,
        "prefetch_experts": plan.prefetch_experts,
        "expert_slots": plan.num_slots,
        "experts": sum(drawn.spec.experts_L),
        "cache_bytes": plan.cache_bytes,
        "activation_bytes": plan.activation_bytes,
        "predicted_tokens_per_s": round(plan.predicted_tokens_per_s, 2),
        "bound_tokens_per_s": round(plan.bound_tokens_per_s, 2),
        "bound_frac": round(plan.bound_frac, 3),
        "bottleneck": plan.bottleneck,
    }
