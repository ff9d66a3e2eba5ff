"""What a plan puts where, in bytes: a line for each thing that lies in memory or on disk. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from poise.plan.candidates import Candidate, PipelineModel
from poise.plan.dense import NUM_SLOTS, DensePlan
from poise.plan.memory import OVERHEAD_BYTES

STREAMING = 4
"""Slots that experts pass through even where none is read ahead: two being read, and those that wait or compute."""
Tier = Literal["memory", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """``count`` of ``what`` in a tier, ``nbytes`` in all; ``count`` is None for what is not counted."""

    what: str
    tier: Tier
    count: int | None
    nbytes: int


def tiers_of(
    model: PipelineModel, candidate: Candidate, dense: DensePlan, *, num_slots: int, ahead: int, budget_bytes: int
) -> tuple[Placed, ...]:
    """Memory's lines sum to the budget, what is left over included. The disk's are what is read from there in passes."""
    lines = [*_in_memory(model, candidate, dense, num_slots, ahead)]
    unused = budget_bytes - sum(line.nbytes for line in lines)
    assert unused >= 0, "a plan that does not fit"
    lines.append(Placed(what="not used", tier="memory", count=None, nbytes=unused))
    return (*(line for line in lines if line.nbytes), *_on_disk(model, candidate, dense, num_slots, ahead))


def num_resident(model: PipelineModel, num_slots: int, ahead: int) -> int:
    """Experts that stay: all where each has a slot, else those that none of the others pass through."""
    return num_slots if num_slots == sum(model.spec.experts_L) else max(0, num_slots - max(ahead, STREAMING))


def _in_memory(
    model: PipelineModel, candidate: Candidate, dense: DensePlan, num_slots: int, ahead: int
) -> Iterator[Placed]:
    layers, streamed = model.spec.num_layers, len(dense.streamed)
    slots_bytes = NUM_SLOTS * dense.slot_bytes if streamed else 0
    resident = num_resident(model, num_slots, ahead)
    for what, count, nbytes in (
        ("dense weights that stay, of layers", layers - streamed, dense.memory_bytes - slots_bytes),
        ("slots for dense layers that stream", NUM_SLOTS, slots_bytes),
        ("experts that stay", resident, resident * model.slot_bytes),
        ("slots for experts that stream", num_slots - resident, (num_slots - resident) * model.slot_bytes),
        ("conversion of experts, prefetch table", None, model.scratch_bytes),
        ("caches", None, candidate.cache_bytes),
        ("activations, logits", None, candidate.activation_bytes),
        ("threads, kernels, allocator", None, OVERHEAD_BYTES),
    ):
        yield Placed(what=what, tier="memory", count=count, nbytes=nbytes)


def _on_disk(
    model: PipelineModel, candidate: Candidate, dense: DensePlan, num_slots: int, ahead: int
) -> Iterator[Placed]:
    experts = sum(model.spec.experts_L) - num_resident(model, num_slots, ahead)
    for what, count, nbytes in (
        ("experts that stream", experts, experts * model.spec.expert_bytes),
        ("dense layers that stream", len(dense.streamed), dense.bytes_per_pass),
        ("caches", None, candidate.disk_cache_bytes),
    ):
        if nbytes:
            yield Placed(what=what, tier="disk", count=count, nbytes=nbytes)
