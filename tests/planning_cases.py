"""Models and costs that the planner's tests share."""

from __future__ import annotations

from dataclasses import dataclass

from poise.plan.dense import DenseSpec
from poise.spec.model_spec import ModelSpec
from poise.units import KIB


@dataclass(frozen=True, kw_only=True)
class FixedCosts:
    """A batch's attention and an expert take the same whatever their tokens; all else takes nothing."""

    attention: float
    expert: float
    disk_bytes_per_s: float

    def attention_s(self, *, rows: int, row_tokens: int, context_tokens: int) -> float:
        return self.attention

    def gate_s(self, tokens: int) -> float:
        return 0.0

    def experts_s(self, tokens: float, active: float) -> float:
        return active * self.expert

    def head_s(self, rows: int) -> float:
        return 0.0


def model_spec(*, layers: int, experts: int, top_k: int, expert_bytes: int, dense_bytes: int) -> ModelSpec:
    return ModelSpec(
        architecture="Test",
        model_type="test",
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        experts_L=(experts,) * layers,
        top_k=top_k,
        hidden=1024,
        vocabulary=1000,
        context_tokens=8192,
        expert_bytes=expert_bytes,
        experts_bytes=expert_bytes * experts * layers,
        dense_bytes=dense_bytes,
        dtype="bfloat16",
    )


def dense_spec(dense_bytes: int, layers: int, streamable_frac: float) -> DenseSpec:
    each = int(dense_bytes * streamable_frac) // layers
    return DenseSpec(total_bytes=dense_bytes, bytes_L=(each,) * layers, slot_bytes_L=(each + 8 * KIB,) * layers)
