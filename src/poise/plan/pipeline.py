"""Klotski's constraint-sensitive planner: batch size, batches, lookahead and what lies in which tier, chosen together.

Candidates are enumerated, each is fitted into the memory budget or dropped, timed by ``plan.passes``, and the fastest is
taken; a plan that does not fit cannot be returned. Pure: numbers in, a frozen plan out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from poise.errors import BudgetError
from poise.plan.dense import DensePlan
from poise.plan.group import GroupShape
from poise.plan.memory import OVERHEAD_BYTES, ActivationSpec, cache_bytes_of
from poise.plan.passes import (
    Held,
    LayerCosts,
    PassShape,
    PassTime,
    Routing,
    attention_layer_s,
    experts_ahead,
    time_pass,
)
from poise.plan.workload import Workload, decode_shape, stages
from poise.spec.model_spec import CacheSpec, ModelSpec
from poise.units import format_bytes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
NUM_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CHUNK_TOKENS = (16, 64, 256, 512)
PASS_TOKENS = (512, 2048, 4096, 8192)
ALTERNATIVES = 5
WORTH_FRAC = 0.01
"""A plan is preferred for its speed only where it is faster by more; else the simpler one is, and the one of less memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineModel:
    """A model in the numbers that a pipeline needs. ``slot_bytes``: one expert in memory; ``scratch_bytes``: beside slots.

    ``dense``: the ways in which its dense weights may lie. ``may_move_cache``: whether caches may be planned on disk.
    """

    spec: ModelSpec
    cache: CacheSpec
    activation: ActivationSpec
    dense: tuple[DensePlan, ...]
    slot_bytes: int
    scratch_bytes: int = 0
    whole_prompts: bool = False
    max_slots: int | None = None
    may_move_cache: tuple[bool, ...] = (False,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Another plan that fits, for the ranking."""

    group: GroupShape
    num_slots: int
    cache_on_disk: bool
    streamed_layers: int
    predicted_tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlan:
    """What runs. Tokens per second count generated tokens over prefill and decode, as the paper does (section 6).

    ``prefetch_experts``: K, experts read before they are asked for. ``num_slots``: experts in memory at once. ``decode``: the
    time of a pass in which every row decodes. ``bound_tokens_per_s``: at the limits of disk and compute of this group shape.
    """

    group: GroupShape
    prefetch_experts: int
    num_slots: int
    dense: DensePlan
    cache_on_disk: bool
    budget_bytes: int
    cache_bytes: int
    activation_bytes: int
    experts_bytes: int
    predicted_tokens_per_s: float
    bound_tokens_per_s: float
    bottleneck: Literal["disk", "compute"]
    decode: PassTime
    alternatives: tuple[Alternative, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Memory of the dense weights, streamed layers' slots included."""
        return self.dense.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """What the plan takes of the budget."""
        return self.dense_bytes + self.cache_bytes + self.activation_bytes + self.experts_bytes + OVERHEAD_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """``cache_bytes`` and ``activation_bytes``: memory that it takes besides weights."""

    group: GroupShape
    cache_on_disk: bool
    dense: DensePlan
    cache_bytes: int
    activation_bytes: int

    def least_bytes(self, model: PipelineModel) -> int:
        """Memory with a single slot."""
        return (
            self.cache_bytes + self.activation_bytes + self.dense.memory_bytes + _fixed_bytes(model) + model.slot_bytes
        )


def plan_pipeline(
    model: PipelineModel,
    costs: LayerCosts,
    workload: Workload,
    *,
    memory_bytes: int,
    routing: Routing | None = None,
    only: Sequence[tuple[int, int]] | None = None,
) -> PipelinePlan:
    """The fastest plan for ``workload`` that fits ``memory_bytes``.

    ``routing``: what was recorded, else uniform. ``only``: (batch size, batches) to choose among. Raises BudgetError, which
    names the smallest budget that works, when nothing fits.
    """
    chances = routing or Routing.uniform(model.spec.experts_L, model.spec.top_k)
    plans: list[PipelinePlan] = []
    smallest: _Candidate | None = None
    for candidate in _candidates(model, workload, only):
        least = candidate.least_bytes(model)
        if smallest is None or least < smallest.least_bytes(model):
            smallest = candidate
        if least <= memory_bytes:
            plans.append(_planned(model, costs, workload, candidate, chances, memory_bytes))
    assert smallest is not None, "there is always a candidate"
    if not plans:
        raise _too_small(model, smallest, memory_bytes)
    fastest = max(plan.predicted_tokens_per_s for plan in plans)
    plans.sort(key=lambda plan: (_rank(plan, fastest), -plan.predicted_tokens_per_s))
    return _with_alternatives(plans)


def refuse_if_too_small(
    model: PipelineModel,
    workload: Workload,
    *,
    memory_bytes: int,
    only: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Raises the BudgetError that ``plan_pipeline`` would raise; takes no times, so that it can come before they are known."""
    candidates = _candidates(model, workload, only or [(1, 1)])
    smallest = min(candidates, key=lambda candidate: candidate.least_bytes(model))
    if smallest.least_bytes(model) > memory_bytes:
        raise _too_small(model, smallest, memory_bytes)


def _rank(plan: PipelinePlan, fastest: float) -> tuple[float, ...]:
    """Speed in steps of ``WORTH_FRAC``, then simplicity, then memory that is not needed for experts."""
    behind = math.floor(math.log(fastest / plan.predicted_tokens_per_s) / WORTH_FRAC)
    memory = plan.activation_bytes + plan.cache_bytes
    return behind, len(plan.dense.streamed), plan.cache_on_disk, plan.group.num_batches, memory


def _candidates(
    model: PipelineModel, workload: Workload, only: Sequence[tuple[int, int]] | None
) -> Iterator[_Candidate]:
    for group in _groups(model, workload, only):
        for on_disk in model.may_move_cache:
            activation_bytes = model.activation.pass_bytes(
                batch_size=group.batch_size,
                num_batches=group.num_batches,
                chunk_tokens=group.chunk_tokens,
                context_tokens=max(workload.total_tokens),
                pass_tokens=group.pass_tokens,
            )
            cache_bytes = cache_bytes_of(
                model.cache.on_disk() if on_disk else model.cache,
                workload.prompt_tokens,
                workload.total_tokens,
                group.max_rows,
                group.batch_size,
            )
            for dense in model.dense:
                yield _Candidate(
                    group=group,
                    cache_on_disk=on_disk,
                    dense=dense,
                    cache_bytes=cache_bytes,
                    activation_bytes=activation_bytes,
                )


def _groups(model: PipelineModel, workload: Workload, only: Sequence[tuple[int, int]] | None) -> Iterator[GroupShape]:
    """Batch sizes and numbers of batches that the requests fill, chunks, and caps on the prompt tokens of a pass."""
    count, longest = workload.num_requests, max(workload.prompt_tokens)
    chunks = [longest] if model.whole_prompts else sorted({min(chunk, longest) for chunk in CHUNK_TOKENS})
    pairs = only or [(size, n) for size in BATCH_SIZES for n in NUM_BATCHES]
    sizes = [(min(size, count), n) for size, n in pairs]
    for size, n in sorted({(size, min(n, math.ceil(count / size))) for size, n in sizes}):
        for chunk in chunks:
            everything = size * n * chunk
            for tokens in sorted({min(everything, max(cap, size * chunk)) for cap in PASS_TOKENS}):
                yield GroupShape(batch_size=size, num_batches=n, chunk_tokens=chunk, pass_tokens=tokens)


def _planned(
    model: PipelineModel,
    costs: LayerCosts,
    workload: Workload,
    candidate: _Candidate,
    routing: Routing,
    memory_bytes: int,
) -> PipelinePlan:
    """The candidate with all memory that is left given to experts, and its predicted speed."""
    group, num_experts = candidate.group, sum(model.spec.experts_L)
    left = memory_bytes - candidate.least_bytes(model) + model.slot_bytes
    slots = min(left // model.slot_bytes, num_experts, model.max_slots or num_experts)
    expert_io_s = model.spec.expert_bytes / costs.disk_bytes_per_s
    ahead = experts_ahead(attention_layer_s(decode_shape(workload, group), costs), expert_io_s, slots)
    held = Held(
        resident=slots if slots == num_experts else max(0, slots - ahead),
        ahead=ahead,
        streamed_bytes=candidate.dense.bytes_per_pass,
        cache_bytes_per_token=model.cache.movable_bytes_per_token if candidate.cache_on_disk else 0,
    )
    best = replace(held, resident=slots, cache_bytes_per_token=0)

    def time(shape: PassShape, each: Held) -> PassTime:
        return time_pass(
            shape,
            each,
            costs=costs,
            routing=routing,
            expert_bytes=model.spec.expert_bytes,
            num_layers=model.spec.num_layers,
        )

    decode = time(decode_shape(workload, group), held)
    seconds = bound_s = 0.0
    for stage in stages(workload, group):
        seconds += stage.passes * time(stage.shape, held).seconds
        bound_s += stage.passes * time(stage.shape, best).limit_s
    tokens = sum(workload.new_tokens)
    return PipelinePlan(
        group=group,
        prefetch_experts=ahead,
        num_slots=slots,
        dense=candidate.dense,
        cache_on_disk=candidate.cache_on_disk,
        budget_bytes=memory_bytes,
        cache_bytes=candidate.cache_bytes,
        activation_bytes=candidate.activation_bytes,
        experts_bytes=slots * model.slot_bytes + model.scratch_bytes,
        predicted_tokens_per_s=tokens / seconds,
        bound_tokens_per_s=tokens / bound_s,
        bottleneck="disk" if decode.disk_s >= decode.compute_s else "compute",
        decode=decode,
    )


def _fixed_bytes(model: PipelineModel) -> int:
    return model.scratch_bytes + OVERHEAD_BYTES


def _too_small(model: PipelineModel, smallest: _Candidate, memory_bytes: int) -> BudgetError:
    needed = smallest.least_bytes(model)
    working = needed - smallest.dense.memory_bytes - model.slot_bytes
    return BudgetError(
        f"a memory budget of {format_bytes(memory_bytes)} is too small; the smallest that works is {needed} bytes "
        f"({format_bytes(needed)}): {format_bytes(smallest.dense.memory_bytes)} dense weights, "
        f"{format_bytes(model.slot_bytes)} for one expert, {format_bytes(working)} to work in",
        smallest_bytes=needed,
    )


def _with_alternatives(plans: Sequence[PipelinePlan]) -> PipelinePlan:
    """The first plan, with the best of every other (batch size, batches) in its ranking."""
    best, *others = plans
    ranking: dict[tuple[int, int], Alternative] = {}
    for plan in others:
        key = (plan.group.batch_size, plan.group.num_batches)
        if key != (best.group.batch_size, best.group.num_batches) and len(ranking) < ALTERNATIVES:
            ranking.setdefault(
                key,
                Alternative(
                    group=plan.group,
                    num_slots=plan.num_slots,
                    cache_on_disk=plan.cache_on_disk,
                    streamed_layers=len(plan.dense.streamed),
                    predicted_tokens_per_s=plan.predicted_tokens_per_s,
                ),
            )
    return replace(best, alternatives=tuple(ranking.values()))
