"""The pipeline planner: plans fit, are refused only when they must be, and get faster with memory and with the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cost.layer_costs import RooflineCosts
from poise.errors import BudgetError
from poise.plan.candidates import PipelineModel
from poise.plan.dense import DensePlan, dense_ways
from poise.plan.memory import OVERHEAD_BYTES, ActivationSpec, CacheTokens
from poise.plan.passes import UNDER_WAY
from poise.plan.pipeline import WORTH_FRAC, PipelinePlan, plan_pipeline, worth_changing
from poise.plan.workload import Workload, stages
from poise.spec.model_spec import CacheSpec
from poise.units import GIB, KIB, MIB
from tests.planning_cases import FixedCosts, dense_spec, model_spec


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything but the budget."""

    model: PipelineModel
    costs: RooflineCosts
    workload: Workload

    def plan(self, memory_bytes: int) -> PipelinePlan:
        return plan_pipeline(self.model, self.costs, self.workload, memory_bytes=memory_bytes)

    def smallest_budget(self) -> int:
        """As the refusal of no budget at all states it."""
        with pytest.raises(BudgetError) as refusal:
            self.plan(1)
        return refusal.value.smallest_bytes


class TokenCosts(FixedCosts):
    """Tokens take time, passes do not."""

    def __init__(self) -> None:
        super().__init__(attention=1e-6, expert=1e-6, disk_bytes_per_s=1e12)

    def attention_s(self, *, rows: int, row_tokens: int, context_tokens: int) -> float:
        return rows * row_tokens * self.attention

    def experts_s(self, tokens: float, active: float) -> float:
        return tokens * self.expert


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    prompts = tuple(draw(st.lists(st.integers(1, 3_000), min_size=1, max_size=30)))
    layers, experts = draw(st.integers(1, 20)), draw(st.integers(2, 64))
    per_layer = draw(st.integers(0, 16 * KIB))
    expert_bytes = draw(st.integers(4 * KIB, 100 * MIB))
    dense_bytes = draw(st.integers(MIB, 4 * GIB))
    model = PipelineModel(
        spec=model_spec(
            layers=layers,
            experts=experts,
            top_k=draw(st.integers(1, min(8, experts))),
            expert_bytes=expert_bytes,
            dense_bytes=dense_bytes,
        ),
        cache=CacheSpec(
            bytes_per_token=per_layer * layers,
            largest_layer_bytes_per_token=per_layer,
            state_bytes=draw(st.integers(0, MIB)),
            movable_bytes_per_token=per_layer * layers,
        ),
        activation=ActivationSpec(
            hidden=1024,
            width=draw(st.sampled_from([64, 4096])),
            expert_width=draw(st.sampled_from([64, 3072])),
            top_k=8,
            vocabulary=draw(st.sampled_from([128, 150_000])),
            itemsize=draw(st.sampled_from([2, 4])),
            materialised_heads=draw(st.sampled_from([0, 64])),
        ),
        dense=dense_ways(dense_spec(dense_bytes, layers, draw(st.floats(0.0, 1.0)))),
        slot_bytes=expert_bytes + 4 * KIB,
        scratch_bytes=draw(st.sampled_from([0, MIB])),
        max_slots=draw(st.none() | st.integers(1, 100)),
        may_move_cache=draw(st.sampled_from([(False,), (True,), (False, True)])),
    )
    costs = RooflineCosts(
        expert_bytes=expert_bytes,
        attention_bytes=max(1, dense_bytes // layers),
        head_bytes=MIB,
        itemsize=2,
        expert_itemsize=2,
        disk_bytes_per_s=draw(st.sampled_from([1e8, 1e9, 1e10])),
    )
    new = draw(st.integers(1, 500))
    return Job(model=model, costs=costs, workload=Workload(prompt_tokens=prompts, new_tokens=(new,) * len(prompts)))


def needed_bytes(job: Job, plan: PipelinePlan) -> int:
    """What the plan takes, counted anew from the functions that say what each part takes."""
    workload, group = job.workload, plan.group
    cache = job.model.cache.on_disk() if plan.cache_on_disk else job.model.cache
    tokens = CacheTokens.of(workload.prompt_tokens, workload.total_tokens, group.batch_size)
    activations = job.model.activation.pass_bytes(
        batch_size=group.batch_size,
        num_batches=group.num_batches,
        chunk_tokens=group.chunk_tokens,
        context_tokens=max(workload.total_tokens),
        pass_tokens=group.pass_tokens,
    )
    experts = plan.num_slots * job.model.slot_bytes + job.model.scratch_bytes
    return plan.dense.memory_bytes + tokens.bytes_in(cache, group.max_rows) + activations + experts + OVERHEAD_BYTES


@settings(max_examples=60, deadline=None)
@given(jobs(), st.floats(1.0, 50.0))
def test_a_plan_never_exceeds_its_budget(job: Job, factor: float) -> None:
    budget = int(job.smallest_budget() * factor)
    plan = job.plan(budget)
    assert plan.memory_bytes <= plan.budget_bytes == budget
    assert sum(each.nbytes for each in plan.tiers if each.tier == "memory") == budget
    assert all(each.nbytes > 0 for each in plan.tiers)
    assert plan.memory_bytes == needed_bytes(job, plan)
    assert plan.dense in job.model.dense
    experts = sum(job.model.spec.experts_L)
    assert 1 <= plan.num_slots <= min(experts, job.model.max_slots or experts)
    assert 1 <= plan.prefetch_experts <= max(1, plan.num_slots // 2)
    assert (plan.group.num_batches - 1) * plan.group.batch_size < job.workload.num_requests, "a batch without rows"
    assert plan.cache_on_disk in job.model.may_move_cache
    assert plan.predicted_tokens_per_s <= plan.bound_tokens_per_s * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_the_smallest_budget_of_a_refusal_works_and_a_byte_less_does_not(job: Job) -> None:
    smallest = job.smallest_budget()
    assert job.plan(smallest).num_slots == 1
    with pytest.raises(BudgetError, match=f"the smallest that works is {smallest} bytes") as refusal:
        job.plan(smallest - 1)
    assert refusal.value.smallest_bytes == smallest
    assert "\n" not in str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(jobs(), st.floats(1.0, 20.0), st.floats(1.0, 20.0))
def test_more_memory_is_never_slower(job: Job, factor: float, more: float) -> None:
    smallest = job.smallest_budget()
    less, greater = job.plan(int(smallest * factor)), job.plan(int(smallest * factor * more))
    assert greater.predicted_tokens_per_s >= less.predicted_tokens_per_s * (1.0 - 2 * WORTH_FRAC)


@settings(max_examples=60, deadline=None)
@given(jobs(), st.floats(1.0, 20.0))
def test_passes_that_are_wanted_large_are_no_smaller_and_as_fast(job: Job, factor: float) -> None:
    large = replace(job, model=replace(job.model, wants_large_passes=True))
    budget = int(job.smallest_budget() * factor)
    plan, larger = job.plan(budget), large.plan(budget)
    assert larger.group.pass_tokens >= plan.group.pass_tokens
    assert larger.predicted_s <= plan.predicted_s * (1.0 + 2 * WORTH_FRAC)
    assert larger.memory_bytes <= budget


def test_where_only_tokens_take_time_the_whole_prompts_come_in_at_once_if_large_passes_are_wanted() -> None:
    model = PipelineModel(
        spec=model_spec(layers=4, experts=8, top_k=2, expert_bytes=MIB, dense_bytes=MIB),
        cache=CacheSpec(
            bytes_per_token=KIB, largest_layer_bytes_per_token=KIB, state_bytes=0, movable_bytes_per_token=0
        ),
        activation=ActivationSpec(
            hidden=64, width=64, expert_width=64, top_k=2, vocabulary=128, itemsize=4, materialised_heads=0
        ),
        dense=dense_ways(dense_spec(MIB, 4, 0.0))[:1],
        slot_bytes=MIB,
    )
    workload = Workload(prompt_tokens=(256, 256), new_tokens=(1, 1))

    def plan(model: PipelineModel) -> PipelinePlan:
        return plan_pipeline(model, TokenCosts(), workload, memory_bytes=GIB, only=[(2, 1)])

    assert plan(model).group.pass_tokens < 512
    assert plan(replace(model, wants_large_passes=True)).group.pass_tokens == 512


@settings(max_examples=60, deadline=None)
@given(jobs(), st.integers(2, 4), st.integers(0, 6))
def test_slots_that_are_wanted_come_before_rows(job: Job, wanted: int, room: int) -> None:
    """Where the smallest group leaves room for them no faster plan has fewer; and what is planned fits all the same."""
    job = replace(job, model=replace(job.model, wanted_slots=wanted))
    budget = job.smallest_budget() + room * job.model.slot_bytes
    plan = job.plan(budget)
    assert plan.num_slots >= min(wanted, 1 + room, job.model.most_slots)
    assert plan.memory_bytes <= budget


@settings(max_examples=40, deadline=None)
@given(jobs())
def test_with_plenty_of_memory_every_expert_stays_and_nothing_is_read_twice(job: Job) -> None:
    job = replace(job, model=replace(job.model, max_slots=None, may_move_cache=(False, True)))
    plan = job.plan(10**15)
    assert plan.num_slots == sum(job.model.spec.experts_L)
    assert plan.decode.disk_s == 0.0
    assert plan.dense.streamed == ()
    assert not plan.cache_on_disk


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_every_prompt_token_and_every_further_token_has_a_pass(job: Job) -> None:
    plan = job.plan(10**15)
    prefill = decode = 0.0
    for stage in stages(job.workload, plan.group):
        prefill += stage.passes * stage.shape.prefill_tokens
        decode += stage.passes * stage.shape.decode_rows
    prompts, new = sum(job.workload.prompt_tokens), sum(job.workload.new_tokens)
    assert prefill >= prompts * (1 - 1e-9)
    assert decode == pytest.approx(new - job.workload.num_requests)


def test_k_is_planned_where_the_first_batch_takes_long_and_not_where_it_does_not() -> None:
    spec = model_spec(layers=16, experts=64, top_k=8, expert_bytes=10_000_000, dense_bytes=300 * MIB)
    model = PipelineModel(
        spec=spec,
        cache=CacheSpec(bytes_per_token=32 * KIB, largest_layer_bytes_per_token=2 * KIB, state_bytes=0),
        activation=ActivationSpec(
            hidden=1024, width=2048, expert_width=1536, top_k=8, vocabulary=1000, itemsize=2, materialised_heads=0
        ),
        dense=dense_ways(dense_spec(300 * MIB, 16, 0.5)),
        slot_bytes=10_000_000,
    )
    workload = Workload(prompt_tokens=(32,) * 64, new_tokens=(64,) * 64)
    planned = {
        attention_s: plan_pipeline(
            model,
            FixedCosts(attention=attention_s, expert=0.001, disk_bytes_per_s=1e9),
            workload,
            memory_bytes=4 * GIB,
            only=[(64, 1)],
        ).prefetch_experts
        for attention_s in (0.001, 0.075)
    }
    assert planned[0.001] == UNDER_WAY + 1
    assert planned[0.075] == UNDER_WAY + 8


def test_dense_layers_stream_where_the_room_is_worth_more_for_rows() -> None:
    """Dense weights of 1.9 GB in a budget of 2: streaming some makes room for rows, and each read serves more tokens."""
    spec = model_spec(layers=16, experts=8, top_k=8, expert_bytes=4 * MIB, dense_bytes=1900 * MIB)
    ways = dense_ways(dense_spec(1900 * MIB, 16, 0.9))
    model = PipelineModel(
        spec=spec,
        cache=CacheSpec(bytes_per_token=256 * KIB, largest_layer_bytes_per_token=16 * KIB, state_bytes=0),
        activation=ActivationSpec(
            hidden=1024, width=2048, expert_width=1536, top_k=8, vocabulary=1000, itemsize=2, materialised_heads=0
        ),
        dense=ways,
        slot_bytes=4 * MIB,
    )
    costs = FixedCosts(attention=0.001, expert=0.0001, disk_bytes_per_s=1e9)
    many, one = (
        plan_pipeline(
            model,
            costs,
            Workload(prompt_tokens=(64,) * count, new_tokens=(64,) * count),
            memory_bytes=2 * GIB,
        )
        for count in (64, 1)
    )
    assert many.dense.streamed
    assert many.group.max_rows > 16
    assert one.dense.streamed == ()
    kept = plan_pipeline(
        replace(model, dense=ways[:1]),
        costs,
        Workload(prompt_tokens=(64,) * 64, new_tokens=(64,) * 64),
        memory_bytes=2 * GIB,
    )
    assert many.predicted_tokens_per_s > 1.5 * kept.predicted_tokens_per_s
    assert worth_changing(kept, many, disk_bytes_per_s=1e9)
    assert not worth_changing(many, many, disk_bytes_per_s=1e9)


def test_one_disk_bound_sequence_more_per_pass_is_nearly_free_so_many_are_planned_together() -> None:
    """Klotski's reason for many batches: the weights are read once for all."""
    spec = model_spec(layers=16, experts=64, top_k=8, expert_bytes=9 * MIB, dense_bytes=300 * MIB)
    model = PipelineModel(
        spec=spec,
        cache=CacheSpec(bytes_per_token=32 * KIB, largest_layer_bytes_per_token=2 * KIB, state_bytes=0),
        activation=ActivationSpec(
            hidden=1024, width=2048, expert_width=1536, top_k=8, vocabulary=1000, itemsize=2, materialised_heads=0
        ),
        dense=(DensePlan(streamed=(), slot_bytes=0, memory_bytes=300 * MIB, bytes_per_pass=0),),
        slot_bytes=9 * MIB + 4 * KIB,
    )
    costs = RooflineCosts(
        expert_bytes=9 * MIB, attention_bytes=20 * MIB, head_bytes=2 * MIB, itemsize=2, expert_itemsize=2
    )
    workload = Workload(prompt_tokens=(32,) * 512, new_tokens=(32,) * 512)
    plan = plan_pipeline(model, costs, workload, memory_bytes=2 * GIB)
    one = plan_pipeline(model, costs, workload, memory_bytes=2 * GIB, only=[(4, 1)])
    assert plan.group.max_rows >= 256
    assert plan.predicted_tokens_per_s > 20 * one.predicted_tokens_per_s
    assert plan.bottleneck == "disk"
