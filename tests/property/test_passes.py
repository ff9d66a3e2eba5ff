"""The time of a pass: the larger of disk and compute, and what reading ahead, recorded routing and the inequalities say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from poise.cost.layer_costs import RooflineCosts
from poise.plan.passes import UNDER_WAY, Held, PassShape, time_pass
from poise.plan.routing import Routing
from poise.units import MIB
from tests.planning_cases import FixedCosts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 512), st.integers(0, 128), st.integers(1, 16))
def test_a_pass_is_the_larger_of_disk_and_compute_and_the_last_inequality_says_which(
    rows: int, resident: int, ahead: int
) -> None:
    costs = RooflineCosts(
        expert_bytes=9 * MIB, attention_bytes=20 * MIB, head_bytes=16 * MIB, itemsize=2, expert_itemsize=2
    )
    shape = PassShape(batch_size=16, decode_rows=rows, prefill_tokens=0, chunk_tokens=16, context_tokens=64)
    held = Held(resident=resident, ahead=ahead, streamed_bytes=0, cache_bytes_per_token=0)
    routing = Routing.uniform((64,) * 16, 8)
    time = time_pass(shape, held, costs=costs, routing=routing, expert_bytes=9 * MIB, num_layers=16)
    assert time.seconds == time.limit_s + time.exposed_s >= max(time.disk_s, time.compute_s)
    assume(abs(time.disk_s - time.compute_s) > 0.05 * time.limit_s)
    assert time.inequalities[-1].holds == (time.compute_s > time.disk_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 512), st.integers(20, 500), st.floats(1e-4, 0.05), st.floats(1e-4, 0.05))
def test_reading_ahead_never_slows_a_pass_but_by_the_slots_that_it_takes(
    rows: int, slots: int, attention_s: float, expert_s: float
) -> None:
    costs = FixedCosts(attention=attention_s, expert=expert_s, disk_bytes_per_s=1e9)
    shape = PassShape(batch_size=16, decode_rows=rows, prefill_tokens=0, chunk_tokens=16, context_tokens=64)
    seconds = []
    for ahead in range(1, 33):
        held = Held(resident=slots, ahead=ahead, streamed_bytes=0, cache_bytes_per_token=0)
        time = time_pass(
            shape, held, costs=costs, routing=Routing.uniform((64,) * 16, 8), expert_bytes=9 * MIB, num_layers=16
        )
        seconds.append(time.seconds)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(seconds))


def test_reading_ahead_fills_the_time_from_the_last_expert_to_the_first_router() -> None:
    """16 layers of 64 experts, all used; a read takes 10 ms, an expert 2 ms, a batch's attention 25 ms: the disk is the
    bottleneck and stands still for 27 ms a layer, which three reads fill beyond those that are under way anyway."""
    costs = FixedCosts(attention=0.025, expert=0.002, disk_bytes_per_s=1e9)
    shape = PassShape(batch_size=64, decode_rows=256, prefill_tokens=0, chunk_tokens=16, context_tokens=64)
    routing = Routing.recorded(np.ones((16, 64)), top_k=64)

    def exposed_s(ahead: int) -> float:
        held = Held(resident=0, ahead=ahead, streamed_bytes=0, cache_bytes_per_token=0)
        return time_pass(shape, held, costs=costs, routing=routing, expert_bytes=10_000_000, num_layers=16).exposed_s

    assert [exposed_s(ahead) for ahead in range(UNDER_WAY, UNDER_WAY + 4)] == pytest.approx(
        [16 * 0.027, 16 * 0.017, 16 * 0.007, 0.0]
    )


def test_through_a_single_slot_no_expert_computes_while_another_is_read() -> None:
    """One layer of 8 experts, all used: 8 reads of 10 ms and 8 computes of 2 ms in turn, behind 5 ms of attention."""
    costs = FixedCosts(attention=0.005, expert=0.002, disk_bytes_per_s=1e9)
    shape = PassShape(batch_size=64, decode_rows=64, prefill_tokens=0, chunk_tokens=16, context_tokens=64)
    routing = Routing.recorded(np.ones((1, 8)), top_k=8)

    def seconds(is_single: bool) -> float:
        held = Held(resident=0, ahead=1, streamed_bytes=0, cache_bytes_per_token=0, slots=1 if is_single else None)
        return time_pass(shape, held, costs=costs, routing=routing, expert_bytes=10_000_000, num_layers=1).seconds

    assert seconds(is_single=True) == pytest.approx(0.005 + 8 * 0.012)
    assert seconds(is_single=False) == pytest.approx(0.005 + 8 * 0.010 + 0.002)


def test_until_all_batches_have_passed_the_router_no_more_is_read_than_there_are_slots() -> None:
    """One layer of 8 experts, all used: 4 batches of 20 ms of attention, beside which 2 slots take 2 of 8 reads of 10 ms; the
    other 6 come later, then the last expert's 2 ms. Six slots take all that 60 ms behind the first router have time for."""
    costs = FixedCosts(attention=0.020, expert=0.002, disk_bytes_per_s=1e9)
    shape = PassShape(batch_size=16, decode_rows=64, prefill_tokens=0, chunk_tokens=16, context_tokens=64)
    routing = Routing.recorded(np.ones((1, 8)), top_k=8)

    def seconds(slots: int) -> float:
        held = Held(resident=0, ahead=1, streamed_bytes=0, cache_bytes_per_token=0, slots=slots)
        return time_pass(shape, held, costs=costs, routing=routing, expert_bytes=10_000_000, num_layers=1).seconds

    assert seconds(2) == pytest.approx(0.080 + 6 * 0.010 + 0.002)
    assert seconds(6) == pytest.approx(0.020 + 8 * 0.010 + 0.002)


def test_routing_that_was_recorded_needs_fewer_reads_than_uniform_routing_does() -> None:
    skewed = Routing.recorded([[1000, 500, *[1] * 62]] * 4, top_k=8)
    uniform = Routing.uniform((64,) * 4, 8)
    assert skewed.active_and_missing(16, 8)[1] < uniform.active_and_missing(16, 8)[1]
    assert uniform.active_and_missing(10_000, 0)[0] == pytest.approx(256)
    assert uniform.active_and_missing(1, 0)[0] == pytest.approx(4 * 8)
