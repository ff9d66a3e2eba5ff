"""A pass as data: every batch goes through every stretch once, each step has what it needs, caches take two slots at most."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.plan.schedule import KV_SLOTS, Policy, Schedule, Step, schedule_pass


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int, int, list[int], bool]:
    layers, batches, on_disk = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.booleans())
    streamed = sorted(draw(st.lists(st.integers(0, layers), max_size=6)))
    schedule = schedule_pass(num_layers=layers, num_batches=batches, streamed=streamed, kv_on_disk=on_disk)
    return schedule, layers, batches, streamed, on_disk


def of_kind(schedule: Schedule, kind: str) -> list[Step]:
    return [step for step in schedule.steps if step.kind == kind]


@given(schedules())
def test_every_batch_goes_through_every_stretch_and_every_layer_and_door_has_its_turn(
    drawn: tuple[Schedule, int, int, list[int], bool],
) -> None:
    schedule, layers, batches, streamed, on_disk = drawn
    stretches = layers + 1 + len(streamed)
    turns = [(stretch, batch) for stretch in range(stretches) for batch in range(batches)]
    assert [(step.place, step.batch) for step in of_kind(schedule, "attention")] == turns
    assert [(step.place, step.batch) for step in of_kind(schedule, "kv")] == (turns if on_disk else [])
    assert Counter((step.layer, step.batch) for step in of_kind(schedule, "gate")) == Counter(
        (layer, batch) for layer in range(layers) for batch in range(batches)
    )
    for kind in ("predict", "experts"):
        assert [step.layer for step in of_kind(schedule, kind)] == list(range(layers))
    assert [(step.layer, step.place) for step in of_kind(schedule, "dense")] == [
        (before, door) for door, before in enumerate(streamed)
    ]


@given(schedules())
def test_each_step_waits_for_earlier_ones_and_through_them_for_all_that_it_needs(
    drawn: tuple[Schedule, int, int, list[int], bool],
) -> None:
    schedule, _, batches, _, _ = drawn
    needed: list[set[int]] = []
    for position, step in enumerate(schedule.steps):
        assert all(each < position for each in step.after)
        needed.append(set(step.after).union(*(needed[each] for each in step.after)))
        before = [schedule.steps[each] for each in needed[position]]
        if step.kind == "attention" and step.place:
            there = {other.batch for other in before if other.kind == "attention" and other.place == step.place - 1}
            assert there == set(range(batches)), "a stretch begins when all batches have met"
        if step.kind == "experts":
            asked = {other.batch for other in before if other.kind == "gate" and other.layer == step.layer}
            assert asked == set(range(batches))
        if step.kind == "gate":
            assert schedule.steps[step.after[0]].kind == "attention"
            assert schedule.steps[step.after[0]].batch == step.batch


@given(schedules())
def test_a_batch_s_experts_are_asked_for_at_once_before_the_next_one_s_attention(
    drawn: tuple[Schedule, int, int, list[int], bool],
) -> None:
    for one, two in pairwise([step for step in drawn[0].steps if step.kind != "kv"]):
        if two.kind == "gate":
            assert (one.kind, one.layer, one.batch) == ("attention", two.layer, two.batch)


@given(schedules())
def test_caches_come_one_ahead_and_never_take_a_third_slot(
    drawn: tuple[Schedule, int, int, list[int], bool],
) -> None:
    last = of_kind(drawn[0], "attention")[-1]
    held: list[tuple[int | None, int | None]] = []
    done: list[tuple[int | None, int | None]] = []
    for step in drawn[0].steps:
        turn = (step.place, step.batch)
        if step.kind == "kv":
            held.append(turn)
            assert len(held) - len(done) <= KV_SLOTS
        elif step.kind == "attention" and drawn[4]:
            assert turn in held
            assert step is last or len(held) - len(done) == KV_SLOTS, (
                "the next one's caches come while this one computes"
            )
            done.append(turn)


def test_the_paper_s_order_for_two_batches_and_one_layer() -> None:
    schedule = schedule_pass(num_layers=1, num_batches=2, policy=Policy(read_ahead="hot"))
    kinds = [(step.kind, step.batch) for step in schedule.steps]
    assert kinds == [
        ("attention", 0),
        ("gate", 0),
        ("attention", 1),
        ("gate", 1),
        ("predict", None),
        ("experts", None),
        ("attention", 0),
        ("attention", 1),
    ]
    assert schedule.policy.read_ahead == "hot"


def test_streamed_layers_that_are_not_in_order_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="order of the pass"):
        schedule_pass(num_layers=2, num_batches=1, streamed=[1, 0])
