"""The life of a slot: free, loading, ready, in use. Bookkeeping only, no memory and no threads.

    free --reserve--> loading --loaded--> ready --acquire--> in use --release--> ready --evict--> free
                         └------failed------------------------------------------------------------^

A slot holds one expert, named by its key (MoE layer, expert). Every move checks that it starts from the right state.
"""

from __future__ import annotations

from enum import Enum

from poise.plan.residency import Key


class State(Enum):
    """Where an expert that has a slot stands."""

    LOADING = "loading"
    READY = "ready"
    IN_USE = "in use"


class Slots:
    """Who has which slot, and in which state. Slots are numbered from 0."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[Key, int] = {}
        self._state: dict[Key, State] = {}
        self.num_slots = num_slots

    def state(self, key: Key) -> State | None:
        """None when the expert has no slot."""
        return self._state.get(key)

    def slot(self, key: Key) -> int:
        """The slot of an expert that has one."""
        return self._slot_of[key]

    @property
    def num_free(self) -> int:
        """Slots without an expert."""
        return len(self._free)

    def keys(self, state: State) -> list[Key]:
        """All experts in a state, in order of arrival."""
        return [key for key, current in self._state.items() if current is state]

    def reserve(self, key: Key) -> int:
        """Gives a free slot to an absent expert, which is now loading."""
        assert key not in self._state, f"expert {key} already has a slot"
        assert self._free, "no free slot"
        slot = self._free.pop()
        self._slot_of[key] = slot
        self._state[key] = State.LOADING
        return slot

    def loaded(self, key: Key) -> None:
        """The expert's bytes are there."""
        self._move(key, State.LOADING, State.READY)

    def failed(self, key: Key) -> None:
        """The read failed: the slot is free again."""
        assert self._state.get(key) is State.LOADING, f"expert {key} is {self._state.get(key)}, not loading"
        self._leave(key)

    def acquire(self, key: Key) -> int:
        """The expert computes: nothing may evict it."""
        self._move(key, State.READY, State.IN_USE)
        return self._slot_of[key]

    def release(self, key: Key) -> None:
        """The expert has computed and stays."""
        self._move(key, State.IN_USE, State.READY)

    def evict(self, key: Key) -> int:
        """Takes the slot away from an expert that is not in use; returns the slot, now free."""
        assert self._state.get(key) is State.READY, f"expert {key} is {self._state.get(key)}, not ready"
        return self._leave(key)

    def shrink(self, num_slots: int) -> list[int]:
        """Withdraws the highest free slots until ``num_slots`` are left or one is taken; returns those withdrawn."""
        withdrawn = []
        while self.num_slots > num_slots and self.num_slots - 1 in self._free:
            self._free.remove(self.num_slots - 1)
            self.num_slots -= 1
            withdrawn.append(self.num_slots)
        return withdrawn

    def grow(self, num_slots: int) -> None:
        """Adds free slots behind the last."""
        for slot in range(self.num_slots, num_slots):
            self._free.insert(0, slot)
        self.num_slots = max(self.num_slots, num_slots)

    def _move(self, key: Key, before: State, after: State) -> None:
        assert self._state.get(key) is before, f"expert {key} is {self._state.get(key)}, not {before}"
        self._state[key] = after

    def _leave(self, key: Key) -> int:
        slot = self._slot_of.pop(key)
        del self._state[key]
        self._free.append(slot)
        return slot
