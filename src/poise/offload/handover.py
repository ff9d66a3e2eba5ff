"""Experts that are in memory, on their way to the compute thread: in the policy's order, by way of the unpacker if quantised.

Every method is called under the store's lock; ``changed`` is told, on a thread of the unpacker, when one is unpacked.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection

from poise.model.layout import Weights
from poise.model.weights import Packed
from poise.offload.slots import Slots, State
from poise.offload.unpacker import Unpacker
from poise.plan.residency import Key
from poise.plan.schedule import ExpertOrder

Changed = Callable[[Key, Exception | None], None]


class Handover:
    """Who may compute now, of the experts that were asked for. A quantised one is in use from when it begins to be unpacked."""

    def __init__(self, slots: Slots, scratch_bytes: int, changed: Changed) -> None:
        """``scratch_bytes``: what the largest quantised expert takes as weights; 0: there are none.

        ``changed``: a method of the store, which this is a part of and does not keep alive.
        """
        self._slots = slots
        self._changed = weakref.WeakMethod(changed)
        self._unpacker = Unpacker(scratch_bytes) if scratch_bytes else None
        self._there: deque[Key] = deque()
        self._to_unpack: deque[tuple[Key, Packed]] = deque()
        self.unpacking = 0

    @property
    def waiting(self) -> list[Key]:
        """Experts that are there and have not begun to compute."""
        return [*self._there, *(key for key, _ in self._to_unpack)]

    def add(self, key: Key, held: Weights | Packed | None) -> None:
        """An expert that was asked for is in memory."""
        if isinstance(held, Packed):
            self._to_unpack.append((key, held))
            self._unpack_next()
        else:
            self._there.append(key)

    def next(self, order: ExpertOrder, wanted: Collection[Key]) -> Key | None:
        """The next expert to compute, if it is there; by number, it may be one that others have overtaken.

        ``wanted``: what was asked for and has not begun to compute.
        """
        if not self._there:
            return None
        if order == "arrival":
            return self._there[0]
        first = min(wanted)
        return first if first in self._there else None

    def take(self, key: Key) -> Weights | None:
        """The expert computes from now on; returns the weights that were unpacked, None where it needed no unpacking."""
        self._there.remove(key)
        if self._unpacker is not None and self._unpacker.has(key):
            return self._unpacker.weights(key)
        self._slots.acquire(key)
        return None

    def put_off(self, key: Key) -> None:
        """An expert that waits gives way to one that is needed sooner; it may be evicted."""
        self._to_unpack = deque(entry for entry in self._to_unpack if entry[0] != key)
        if key in self._there:
            self._there.remove(key)
        if self._slots.state(key) is State.IN_USE:
            self.release(key)

    def release(self, key: Key) -> None:
        """The expert is in use no longer."""
        self._slots.release(key)
        if self._unpacker is not None:
            self._unpacker.free(key)
            self._unpack_next()

    def unpacked(self, key: Key, error: Exception | None) -> None:
        """The unpacker is done with an expert."""
        self.unpacking -= 1
        if error is None:
            self._there.append(key)

    def stop(self) -> None:
        """No expert begins to be unpacked any more."""
        self._to_unpack.clear()

    def clear(self) -> None:
        """Nobody waits, and whatever is in use is released; nothing may be unpacking."""
        self.stop()
        self._there.clear()
        for key in self._slots.keys(State.IN_USE):
            self.release(key)

    def close(self) -> None:
        """Ends the unpacker's threads. Safe to call twice."""
        if self._unpacker is not None:
            self._unpacker.close()

    def _unpack_next(self) -> None:
        changed = self._changed()
        assert changed is not None, "the store is alive while it calls"
        while self._to_unpack and self._unpacker is not None and self._unpacker.has_room:
            key, packed = self._to_unpack.popleft()
            self._slots.acquire(key)
            self.unpacking += 1
            self._unpacker.submit(key, packed, changed)
