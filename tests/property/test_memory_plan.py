"""How a budget is divided: never more than it is, refused only when it must be, and more is never worse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from poise.errors import BudgetError
from poise.plan.memory import OVERHEAD_BYTES, ActivationSpec, MemoryPlan, plan_memory
from poise.spec.model_spec import CacheSpec
from poise.units import GIB, KIB, MIB

Job = dict[str, Any]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Everything but the budget: a model and its requests."""
    prompts = draw(st.lists(st.integers(1, 5_000), min_size=1, max_size=40))
    new_tokens = draw(st.integers(1, 1_000))
    per_layer = draw(st.integers(0, 64 * KIB))
    cache = CacheSpec(
        bytes_per_token=per_layer * draw(st.integers(1, 60)),
        largest_layer_bytes_per_token=per_layer,
        state_bytes=draw(st.integers(0, 4 * MIB)),
    )
    activation = ActivationSpec(
        hidden=draw(st.sampled_from([64, 1024, 8192])),
        width=draw(st.sampled_from([64, 4096, 32_768])),
        expert_width=draw(st.sampled_from([64, 3072, 28_672])),
        top_k=draw(st.integers(1, 8)),
        vocabulary=draw(st.sampled_from([128, 150_000])),
        itemsize=draw(st.sampled_from([2, 4])),
        materialised_heads=draw(st.sampled_from([0, 64])),
    )
    return {
        "dense_bytes": draw(st.integers(MIB, 20 * GIB)),
        "slot_bytes": draw(st.integers(4 * KIB, 500 * MIB)),
        "num_experts": draw(st.integers(1, 4_000)),
        "cache": cache,
        "activation": activation,
        "prompt_tokens": prompts,
        "total_tokens": [prompt + new_tokens for prompt in prompts],
        "max_slots": draw(st.none() | st.integers(1, 100)),
    }


def smallest_budget(job: Job) -> int:
    """The smallest budget that works, as the refusal of no budget at all states it."""
    with pytest.raises(BudgetError) as refusal:
        plan_memory(budget_bytes=1, **job)
    return refusal.value.smallest_bytes


def shape(plan: MemoryPlan) -> tuple[int, int, int]:
    """What makes up the working memory of a plan."""
    return plan.batch_size, plan.num_batches, plan.chunk_tokens


@settings(max_examples=150, deadline=None)
@given(jobs(), st.floats(1.0, 100.0))
def test_a_plan_never_exceeds_its_budget(job: Job, factor: float) -> None:
    budget = int(smallest_budget(job) * factor)
    plan = plan_memory(budget_bytes=budget, **job)
    used = job["dense_bytes"] + OVERHEAD_BYTES + plan.cache_bytes + plan.activation_bytes + plan.experts_bytes
    assert used <= plan.budget_bytes == budget
    assert plan.experts_bytes == plan.num_slots * job["slot_bytes"]
    assert 1 <= plan.num_slots <= min(job["num_experts"], job["max_slots"] or job["num_experts"])
    assert 1 <= plan.batch_size <= len(job["prompt_tokens"])
    assert (plan.num_batches - 1) * plan.batch_size < len(job["prompt_tokens"]), "a batch without rows is planned"


@settings(max_examples=150, deadline=None)
@given(jobs())
def test_the_smallest_budget_of_a_refusal_works_and_a_byte_less_does_not(job: Job) -> None:
    smallest = smallest_budget(job)
    assert plan_memory(budget_bytes=smallest, **job).num_slots == 1
    with pytest.raises(BudgetError, match=f"the smallest that works is {smallest} bytes") as refusal:
        plan_memory(budget_bytes=smallest - 1, **job)
    assert refusal.value.smallest_bytes == smallest
    assert "\n" not in str(refusal.value)


@settings(max_examples=150, deadline=None)
@given(jobs(), st.floats(1.0, 20.0), st.floats(1.0, 20.0))
def test_more_memory_never_runs_fewer_rows_nor_holds_fewer_experts_beside_the_same_rows(
    job: Job, factor: float, more: float
) -> None:
    smallest = smallest_budget(job)
    less = plan_memory(budget_bytes=int(smallest * factor), **job)
    greater = plan_memory(budget_bytes=int(smallest * factor * more), **job)
    assert greater.max_rows >= less.max_rows
    if shape(greater) == shape(less):
        assert greater.num_slots >= less.num_slots


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_with_plenty_of_memory_every_expert_stays_and_no_row_waits(job: Job) -> None:
    plan = plan_memory(budget_bytes=10**18, **job)
    assert plan.num_slots == min(job["num_experts"], job["max_slots"] or job["num_experts"])
    assert plan.max_rows >= min(len(job["prompt_tokens"]), 16 * 16)


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_rows_take_at_most_half_of_what_is_free_when_there_is_a_choice(job: Job) -> None:
    """More rows than one are planned only where they leave as much to the experts, or the experts need no more."""
    budget = 2 * smallest_budget(job)
    plan = plan_memory(budget_bytes=budget, **job)
    assume(plan.max_rows > 1)
    free = budget - job["dense_bytes"] - OVERHEAD_BYTES
    wanted = min(job["num_experts"], job["max_slots"] or job["num_experts"])
    assert plan.num_slots == wanted or plan.cache_bytes + plan.activation_bytes <= free // 2


def test_rows_of_a_batch_are_counted_with_the_padding_they_get() -> None:
    """A long prompt with a short answer beside short prompts with long answers: those rows' caches hold both lengths."""
    cache = CacheSpec(bytes_per_token=KIB, largest_layer_bytes_per_token=0, state_bytes=0)
    activation = ActivationSpec(
        hidden=64, width=64, expert_width=64, top_k=2, vocabulary=128, itemsize=2, materialised_heads=0
    )
    plan = plan_memory(
        budget_bytes=10 * GIB,
        dense_bytes=MIB,
        slot_bytes=MIB,
        num_experts=1,
        cache=cache,
        activation=activation,
        prompt_tokens=[1_000, 10, 10, 10],
        total_tokens=[1_001, 1_010, 1_010, 1_010],
    )
    assert plan.batch_size == 4, "the case needs all requests in one batch"
    assert plan.cache_bytes >= 3 * (1_000 + 1_000) * KIB
