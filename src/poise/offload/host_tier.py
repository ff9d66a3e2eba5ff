"""DRAM between the disk and a device: all experts where they fit, else a window that is filled ahead of the device.

Klotski's middle tier: while the device computes layer i and pulls i + 1 from here, layers up to i + L are read from the disk.
The tier above fetches an expert and gives it back when it has been copied; what is read and who leaves for it is decided in
``plan.expert_reads``, as for the tier above, by what layers ask for (``enter``, ``will_use``). Safe on any thread; callbacks
come on the thread that fetches, or on a reader thread, under no lock of this class.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from poise.model.arena import Arena
from poise.model.layout import ExpertSource, Weights
from poise.model.weights import Convert, Packed
from poise.offload.loader import Loader
from poise.offload.pinned import Pinned
from poise.offload.slots import Slots, State
from poise.plan.expert_reads import Holdings, NextRead, next_read
from poise.plan.outlook import Outlook
from poise.plan.residency import Key
from poise.plan.schedule import Policy
from poise.spec.timeline import Timeline

There = Callable[[Weights | None, Exception | None], None]
"""Told of an expert that is in DRAM until it is given back, or of the error."""


class HostTier:
    """``num_slots`` experts of ``sources_LE`` in DRAM. ``ahead``: how many may be there that the device has not fetched yet.

    ``is_pinned``: whether a GPU copies from here. No expert may stay packed.
    """

    def __init__(
        self,
        sources_LE: Sequence[Sequence[ExpertSource]],
        *,
        num_slots: int,
        slot_bytes: int,
        reader_threads: int,
        convert: Convert,
        ahead: int,
        is_pinned: bool,
    ) -> None:
        experts_L = [len(row) for row in sources_LE]
        arena = Arena(num_slots, slot_bytes)
        self._pinned = Pinned(arena.bytes_of(0, 0, num_slots * arena.slot_bytes)) if is_pinned else None
        self._loader = Loader(sources_LE, arena, reader_threads=reader_threads, convert=convert)
        self._slots = Slots(num_slots)
        self._outlook = Outlook(experts_L)
        self._policy = Policy(read_ahead="likely", ahead=ahead)
        self._absent_LE = np.arange(max(experts_L)) < np.asarray(experts_L)[:, None]
        self._idle_LE = np.zeros_like(self._absent_LE)
        self._ahead: set[Key] = set()
        self._pending: deque[Key] = deque()
        self._callers: dict[Key, list[There]] = {}
        self._held: dict[Key, int] = {}
        self._weights: dict[Key, Weights] = {}
        self._under_way = 0
        self._lock = threading.RLock()
        self._is_closed = False
        self.bytes_read = 0

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._loader.is_direct

    @property
    def num_slots(self) -> int:
        """Experts that fit."""
        return self._slots.num_slots

    @property
    def timeline(self) -> Timeline | None:
        """Where reads from the disk are noted, if anywhere."""
        return self._loader.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._loader.timeline = timeline

    def source(self, key: Key) -> ExpertSource:
        """Where an expert lies on disk."""
        return self._loader.source(key)

    def enter(self, layer: int) -> None:
        """A layer begins to ask."""
        with self._lock:
            self._ahead = {key for key in self._ahead if key[0] != self._outlook.layer}
            self._outlook.enter(layer)
            self._pump()

    def will_use(self, experts: Iterable[int]) -> None:
        """What the layer at hand asks for, also what is on the device."""
        with self._lock:
            self._outlook.used.update(experts)

    def fetch(self, key: Key, there: There) -> None:
        """Has an expert in DRAM, from the disk if need be, and tells ``there``; it stays until it is given back."""
        with self._lock:
            self._ahead.discard(key)
            weights = self._hold(key)
            if weights is None:
                if self._slots.state(key) is None and key not in self._callers:
                    self._pending.append(key)
                self._callers.setdefault(key, []).append(there)
                self._pump()
        if weights is not None:
            there(weights, None)

    def give_back(self, key: Key) -> None:
        """The device has it, and will not need it again before the next pass."""
        with self._lock:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                self._slots.release(key)
                self._idle_LE[key] = True
            self._outlook.has_computed(key)
            self._pump()

    def close(self) -> None:
        """Ends the reader threads and unpins the memory. Nothing may be copying from here. Safe to call twice."""
        with self._lock:
            self._is_closed = True
        self._loader.close()
        if self._pinned is not None:
            self._pinned.close()

    def _hold(self, key: Key) -> Weights | None:
        """An expert's weights, held once more, if it is there."""
        state = self._slots.state(key)
        if state is State.READY:
            self._slots.acquire(key)
            self._idle_LE[key] = False
        elif state is not State.IN_USE:
            return None
        self._held[key] = self._held.get(key, 0) + 1
        if key not in self._weights:
            self._weights[key] = self._loader.laid_out(key, self._slots.slot(key))
        return self._weights[key]

    def _pump(self) -> None:
        while self._under_way < self._loader.max_under_way and not self._is_closed:
            asked = self._pending[0] if self._pending else None
            found = next_read(self._policy, self._outlook, self._holdings(), asked)
            if not isinstance(found, NextRead):
                return
            self._start(found)

    def _holdings(self) -> Holdings:
        return Holdings(
            absent_LE=self._absent_LE,
            idle_LE=self._idle_LE,
            num_slots=self._slots.num_slots,
            num_free=self._slots.num_free,
            num_ahead=len(self._ahead),
            waiting=(),
        )

    def _start(self, read: NextRead) -> None:
        if read.is_ahead:
            self._ahead.add(read.key)
        else:
            self._pending.popleft()
        if read.evict is not None:
            self._evict(read.evict)
        slot = self._slots.reserve(read.key)
        self._absent_LE[read.key] = False
        self._under_way += 1
        self.bytes_read += self._loader.nbytes(read.key)
        label = "read ahead" if read.is_ahead else "read"
        self._loader.start(read.key, slot, label=label, done=self._arrived)

    def _evict(self, key: Key) -> None:
        self._slots.evict(key)
        self._absent_LE[key] = True
        self._idle_LE[key] = False
        self._ahead.discard(key)
        self._weights.pop(key, None)

    def _arrived(self, key: Key, weights: Weights | Packed | None, error: Exception | None) -> None:
        """On a reader thread."""
        assert not isinstance(weights, Packed), "experts for a device are unpacked when they arrive in DRAM"
        with self._lock:
            self._under_way -= 1
            callers = self._callers.pop(key, [])
            held = None if error is not None else self._taken_in(key, weights, len(callers))
            if error is not None:
                self._slots.failed(key)
                self._absent_LE[key] = True
                self._ahead.discard(key)
            self._pump()
        for there in callers:
            there(held, error)

    def _taken_in(self, key: Key, weights: Weights | None, callers: int) -> Weights | None:
        """An expert that has arrived, held once for each caller."""
        self._slots.loaded(key)
        self._idle_LE[key] = True
        if weights is not None:
            self._weights[key] = weights
        for _ in range(callers):
            weights = self._hold(key)
        return weights
