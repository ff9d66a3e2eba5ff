"""Plans for dense weights: they fit, more room never streams more, and the smallest room that is named works."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from poise.plan.dense import (
    DENSE_FRAC,
    NUM_SLOTS,
    DenseSpec,
    plan_dense,
    smallest_plan,
    smallest_room_bytes,
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


@given(specs(), st.integers(0, 80_000), st.integers(0, 80_000))
def test_more_room_keeps_more_in_memory(spec: DenseSpec, room: int, more: int) -> None:
    plan, richer = (plan_dense(spec, room_bytes=each) for each in (room, room + more))
    assert plan.memory_bytes <= richer.memory_bytes
    assert plan.memory_bytes <= DENSE_FRAC * room or plan == smallest_plan(spec)


@given(specs(), st.integers(0, 30_000))
def test_the_smallest_room_works_and_no_smaller_does(spec: DenseSpec, working: int) -> None:
    room = smallest_room_bytes(spec, working)
    assert plan_dense(spec, room_bytes=room).memory_bytes + working <= room
    for smaller in range(max(0, room - 400), room):
        assert plan_dense(spec, room_bytes=smaller).memory_bytes + working > smaller


def test_streamed_layers_are_spread_over_the_model() -> None:
    spec = DenseSpec(total_bytes=1300, bytes_L=(100,) * 12, slot_bytes_L=(100,) * 12)
    assert stream_layers(spec, 8).streamed == (2, 5, 8, 11)
    assert stream_layers(spec, 0).streamed == tuple(range(12))
    assert stream_layers(spec, 10).streamed == ()
