"""The life of a slot under any sequence of moves: no slot twice, none lost, no illegal move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from poise.offload.slots import Key, Slots, State

KEYS = [(layer, expert) for layer in range(2) for expert in range(4)]
MAX_SLOTS = 6
LEGAL: dict[str, State | None] = {
    "reserve": None,
    "loaded": State.LOADING,
    "failed": State.LOADING,
    "acquire": State.READY,
    "release": State.IN_USE,
    "evict": State.READY,
}
"""The state that each move starts from."""


class SlotLife(RuleBasedStateMachine):
    """Any expert, any move: the legal ones do what the drawing in ``offload.slots`` says, the others change nothing."""

    @initialize(num_slots=st.integers(1, MAX_SLOTS))
    def begin(self, num_slots: int) -> None:
        self.slots = Slots(num_slots)
        self.state: dict[Key, State] = {}
        self.slot: dict[Key, int] = {}
        self.num_slots = num_slots

    def move(self, name: str, key: Key) -> int | None:
        """Makes a legal move and returns what it returns; checks that an illegal one is refused."""
        make: Callable[[Key], int | None] = getattr(self.slots, name)
        room = name != "reserve" or len(self.state) < self.num_slots
        if self.state.get(key) is LEGAL[name] and room:
            return make(key)
        with pytest.raises(AssertionError):
            make(key)
        return None

    @rule(key=st.sampled_from(KEYS))
    def reserve(self, key: Key) -> None:
        slot = self.move("reserve", key)
        if slot is not None:
            assert slot not in self.slot.values(), "a slot was given away twice"
            self.state[key], self.slot[key] = State.LOADING, slot

    @rule(key=st.sampled_from(KEYS), name=st.sampled_from(["loaded", "acquire", "release"]))
    def go_on(self, key: Key, name: str) -> None:
        legal = self.state.get(key) is LEGAL[name]
        slot = self.move(name, key)
        if legal:
            self.state[key] = {"loaded": State.READY, "acquire": State.IN_USE, "release": State.READY}[name]
            assert slot in (None, self.slot[key])

    @rule(key=st.sampled_from(KEYS), name=st.sampled_from(["failed", "evict"]))
    def leave(self, key: Key, name: str) -> None:
        legal = self.state.get(key) is LEGAL[name]
        slot = self.move(name, key)
        if legal:
            del self.state[key]
            assert slot in (None, self.slot.pop(key, None))

    @rule(num_slots=st.integers(1, MAX_SLOTS))
    def grow(self, num_slots: int) -> None:
        self.slots.grow(num_slots)
        self.num_slots = max(self.num_slots, num_slots)

    @rule(num_slots=st.integers(1, MAX_SLOTS))
    def shrink(self, num_slots: int) -> None:
        withdrawn = self.slots.shrink(num_slots)
        expected = list(range(self.num_slots - 1, num_slots - 1, -1))
        taken = set(self.slot.values())
        stop = next((place for place, slot in enumerate(expected) if slot in taken), len(expected))
        assert withdrawn == expected[:stop]
        self.num_slots -= len(withdrawn)

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def run_to_the_end_of_its_life(self, data: st.DataObject) -> None:
        """Whatever state an expert is in, there is a way to free its slot."""
        key = data.draw(st.sampled_from(sorted(self.state)))
        for state, name in ((State.LOADING, "loaded"), (State.READY, "acquire"), (State.IN_USE, "release")):
            if self.slots.state(key) is state:
                getattr(self.slots, name)(key)
        assert self.slots.evict(key) == self.slot.pop(key)
        del self.state[key]

    @invariant()
    def every_slot_is_free_or_held_once(self) -> None:
        held = [self.slots.slot(key) for key in self.state]
        assert len(set(held)) == len(held)
        assert all(0 <= slot < self.num_slots for slot in held)
        assert self.slots.num_slots == self.num_slots
        assert self.slots.num_free + len(held) == self.num_slots

    @invariant()
    def every_expert_is_where_it_should_be(self) -> None:
        assert {key: self.slots.state(key) for key in KEYS} == {key: self.state.get(key) for key in KEYS}
        assert {key: self.slots.slot(key) for key in self.state} == self.slot
        for state in State:
            assert sorted(self.slots.keys(state)) == sorted(key for key, each in self.state.items() if each is state)


TestSlotLife = SlotLife.TestCase
TestSlotLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
