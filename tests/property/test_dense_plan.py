"""Plans for dense weights: they fit, the slots are counted, and the ways go from all in memory to the least."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from poise.plan.dense import (
    MAX_WAYS,
    NUM_SLOTS,
    DenseSpec,
    dense_ways,
    stream_layers,
)


@st.composite
def specs(draw: st.DrawFn) -> DenseSpec:
    bytes_L = draw(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
    padding_L = [draw(st.integers(0, 300)) if nbytes else 0 for nbytes in bytes_L]
    return DenseSpec(
        total_bytes=sum(bytes_L) + draw(st.integers(0, 9000)),
        bytes_L=tuple(bytes_L),
        slot_bytes_L=tuple(a + b for a, b in zip(bytes_L, padding_L, strict=True)),
    )


@given(specs(), st.integers(0, 12))
def test_what_stays_and_the_slots_make_up_the_memory(spec: DenseSpec, num_resident: int) -> None:
    plan = stream_layers(spec, num_resident)
    assert plan.memory_bytes <= spec.total_bytes + NUM_SLOTS * max(spec.slot_bytes_L)
    assert list(plan.streamed) == sorted(set(plan.streamed))
    assert all(0 < spec.slot_bytes_L[layer] <= plan.slot_bytes for layer in plan.streamed)
    moved = sum(spec.bytes_L[layer] for layer in plan.streamed)
    assert plan.bytes_per_pass == moved
    assert plan.memory_bytes == spec.total_bytes - moved + NUM_SLOTS * plan.slot_bytes
    if plan.streamed:
        assert len(spec.bytes_L) - len(plan.streamed) >= min(num_resident, len(spec.bytes_L))
        assert len(plan.streamed) > NUM_SLOTS


@given(specs())
def test_ways_go_from_all_in_memory_to_the_least_that_streaming_reaches(spec: DenseSpec) -> None:
    ways = dense_ways(spec)
    assert ways[0].streamed == ()
    assert ways[0].memory_bytes == spec.total_bytes
    taken = [way.memory_bytes for way in ways]
    assert taken == sorted(set(taken), reverse=True)
    every = [stream_layers(spec, resident).memory_bytes for resident in range(len(spec.bytes_L) + 1)]
    assert taken[-1] == min(every)


def test_of_many_ways_some_are_told_apart_the_ends_included() -> None:
    spec = DenseSpec(total_bytes=10_000, bytes_L=(100,) * 94, slot_bytes_L=(100,) * 94)
    ways = dense_ways(spec)
    assert len(ways) == MAX_WAYS
    assert (len(ways[0].streamed), len(ways[-1].streamed)) == (0, 94)


def test_streamed_layers_are_spread_over_the_model() -> None:
    spec = DenseSpec(total_bytes=1300, bytes_L=(100,) * 12, slot_bytes_L=(100,) * 12)
    assert stream_layers(spec, 8).streamed == (2, 5, 8, 11)
    assert stream_layers(spec, 0).streamed == tuple(range(12))
    assert stream_layers(spec, 10).streamed == ()
