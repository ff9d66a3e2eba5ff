"""Experts on demand: asked for as soon as a router has spoken, read behind compute, kept as the policy says.

The compute thread calls ``request`` (what this layer needs), ``take`` (the next expert that is there) and ``release``; a
supplier's threads deliver, from the tier below: the disk, or DRAM where this is a GPU's memory. What comes next and who leaves
for it is decided in ``plan.expert_reads``; here is what is in memory, behind one condition. Streamed dense weights wait in the
same line (``read_dense``). The supplier is given no more than it does at once: a late demand never stands behind many guesses.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from poise.errors import ReadError
from poise.model.layout import ExpertSource, Weights
from poise.model.reader import Done, Label, Read
from poise.model.weights import Packed
from poise.offload.handover import Handover
from poise.offload.slots import Slots, State
from poise.offload.supplier import Supplier
from poise.plan.expert_reads import Dense, Holdings, Idle, NextRead, next_read
from poise.plan.outlook import Foreseen, Outlook
from poise.plan.residency import Key
from poise.plan.schedule import Policy
from poise.predict.guesses import Guesses, Ints
from poise.predict.hits import Hits
from poise.spec.timeline import COMPUTE, Gaps, Timeline


@dataclass(slots=True)
class StoreCounters:
    """Since the store was made. A hit was in memory when its layer asked; ``prefetched`` counts reads nobody had
    asked for; ``ahead``: how good the choice of these was, as far as their layer has come since."""

    hits: int = 0
    misses: int = 0
    reads: int = 0
    prefetched: int = 0
    bytes_read: int = 0
    ahead: Hits = field(default_factory=Hits)


@dataclass(frozen=True, kw_only=True, slots=True)
class _DenseRead:
    """A piece of dense weights that waits to be read, and the MoE layer that it leads to."""

    read: Read
    done: Done
    label: Label
    moe_layer: int


class ExpertStore:
    """Holds up to ``num_slots`` experts in memory and has ``supplier`` bring the others when asked.

    ``experts_L``: how many each MoE layer has. ``scratch_bytes``: of the largest that is unpacked for each use; 0: none is.
    """

    def __init__(self, experts_L: Sequence[int], supplier: Supplier, *, num_slots: int, scratch_bytes: int = 0) -> None:
        self._slots = Slots(num_slots)
        self._supplier = supplier
        self._handover = Handover(self._slots, scratch_bytes, self._unpacked)
        self._outlook = Outlook(experts_L)
        self._under_way = 0
        self._absent_LE = np.arange(max(experts_L)) < np.asarray(experts_L)[:, None]
        self._idle_LE = np.zeros_like(self._absent_LE)
        self._ahead: set[Key] = set()
        self._guesses = Guesses()
        self._pending: deque[Key] = deque()
        self._dense: deque[_DenseRead] = deque()
        self._wanted: set[Key] = set()
        self._weights: dict[Key, Weights | Packed] = {}
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closed = False
        self._gaps: Gaps | None = None
        self.policy = Policy()
        self.while_waiting: Callable[[], bool] | None = None
        """Called on the compute thread while an expert is not there yet; False: it has nothing to do now."""
        self.counters = StoreCounters()

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._supplier.is_direct

    @property
    def timeline(self) -> Timeline | None:
        """Where reads, waits and idle times of the disk are recorded; None: nowhere."""
        return self._supplier.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        with self._changed:
            self._supplier.timeline = timeline
            self._gaps = None if timeline is None else Gaps(timeline, self._supplier.track, "idle: ", Idle.NOT_FORESEEN)

    @property
    def num_slots(self) -> int:
        """Slots in service."""
        return self._slots.num_slots

    def request(self, layer: int, experts: Iterable[int]) -> None:
        """Says that ``layer`` (position among the MoE layers) needs these experts; reads start at once. Repeats are free."""
        with self._changed:
            outlook = self._outlook
            if layer != outlook.layer or (outlook.used and not self._wanted):
                self._ahead = {key for key in self._ahead if key[0] != outlook.layer}
                outlook.enter(layer)
                self._guesses.enter(layer, self._absent_LE[layer])
                self._supplier.enter(layer)
            self._supplier.will_use(experts := list(experts))
            for expert in experts:
                if expert not in outlook.used:
                    outlook.used.add(expert)
                    self._want((layer, expert))
            if self.policy.order == "index":
                self._pending = deque(sorted(self._pending))
            self._pump()

    def open(self, files: Sequence[Path]) -> None:
        """Opens files that dense weights will be read from. Raises ReadError."""
        self._supplier.open(files)

    def read_dense(self, read: Read, done: Done, *, label: Label, moe_layer: int) -> None:
        """Has dense weights read when their turn comes, in the order of the calls.

        ``moe_layer``: the one they lead to. ``done``: as ``model.reader`` says; told of an error if the store closes first.
        """
        with self._changed:
            self._dense.append(_DenseRead(read=read, done=done, label=label, moe_layer=moe_layer))
            self._pump()

    def judge(self, layer: int, chosen_TK: Ints) -> None:
        """Every batch has asked for what it needs of ``layer``, the one at hand: counts how good was what was read ahead.

        ``chosen_TK``: what the tokens of all batches chose.
        """
        with self._changed:
            self.counters.ahead += self._guesses.judge(layer, chosen_TK)

    def foresee(self, layer: int, foreseen: Foreseen) -> None:
        """Says what the pass uses of ``layer``, the one after the layer whose every batch has just asked.

        Until that layer asks, this replaces the running chance in what is read ahead and what is evicted.
        """
        with self._changed:
            if self._outlook.foresee(layer, foreseen):
                self._pump()

    def take(self) -> tuple[int, Weights]:
        """The next expert that was asked for and is in memory, in use from now on: residents first, then as they arrive.

        Blocks until one is there. Its weights hold until it is released. Raises ReadError when the disk fails.
        """
        self._spend_wait()
        with self._changed:
            key = self._next()
            if key is None:
                key = self._wait_for_an_expert()
            unpacked = self._handover.take(key)
            self._wanted.discard(key)
            held = self._weights.get(key)
            self._supplier.before_use(self._slots.slot(key))
        if unpacked is not None:
            return key[1], unpacked
        return key[1], self._laid_out(key) if held is None else _as_weights(held)

    def release(self, expert: int) -> None:
        """The expert of the layer at hand has computed for everyone; it may be evicted."""
        with self._changed:
            key = (self._outlook.layer, expert)
            self._supplier.after_use(self._slots.slot(key))
            self._handover.release(key)
            self._idle_LE[key] = True
            self._outlook.has_computed(key)
            self._pump()

    def resize(self, num_slots: int) -> None:
        """Puts more or fewer slots into service, between passes; evicts as needed and returns their memory."""
        with self._changed:
            self._drain()
            for key in sorted(self._slots.keys(State.READY), key=self._slots.slot, reverse=True):
                if self._slots.slot(key) >= num_slots:
                    self._evict(key)
            self._slots.shrink(num_slots)
            self._supplier.resize(max(num_slots, self._slots.num_slots))
            self._slots.grow(num_slots)

    def abandon(self) -> None:
        """Forgets what was asked for, after an aborted pass; experts in use become ready again."""
        with self._changed:
            self._pending.clear()
            self._wanted.clear()
            self._handover.stop()
            self._drain()
            for key in self._slots.keys(State.IN_USE):
                self._supplier.after_use(self._slots.slot(key))
            self._handover.clear()
            for key in self._slots.keys(State.READY):
                self._idle_LE[key] = True
            self._outlook.forget()
            self._guesses.forget()
            self._error = None

    def residents(self) -> Iterator[tuple[ExpertSource, Weights | Packed]]:
        """Every expert in memory; between passes only. What was asked for is forgotten."""
        self.abandon()
        for key in self._slots.keys(State.READY):
            held = self._weights.get(key)
            yield self._supplier.source(key), self._laid_out(key) if held is None else held

    def close(self) -> None:
        """Ends the supplier's threads."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            never, self._dense = self._dense, deque()
        for each in never:
            each.done(ReadError("the experts' store was closed before dense weights were read"))
        self._supplier.close()
        self._handover.close()

    def cut_gap(self) -> None:
        """Writes the disk's idle time so far into the timeline, if there is one: a pass ends, the gap may not."""
        with self._changed:
            if self._gaps is not None:
                self._gaps.cut()

    def _want(self, key: Key) -> None:
        self._wanted.add(key)
        self._ahead.discard(key)
        self._idle_LE[key] = False
        state = self._slots.state(key)
        if state is State.READY:
            self.counters.hits += 1
            self._handover.add(key, self._weights.get(key))
            return
        self.counters.misses += 1
        if state is None:
            self._pending.append(key)

    def _next(self) -> Key | None:
        return self._handover.next(self.policy.order, self._wanted)

    def _spend_wait(self) -> None:
        """Until an expert is there, others may use the compute thread, a piece of work at a time."""
        while self.while_waiting is not None:
            with self._changed:
                if self._next() is not None or self._error is not None:
                    return
            if not self.while_waiting():
                return

    def _wait_for_an_expert(self) -> Key:
        began_ns = perf_counter_ns()
        while (key := self._next()) is None:
            if self._error is not None:
                raise self._error
            assert self._pending or self._under_way or self._handover.unpacking, (
                "more experts are taken than were asked for"
            )
            self._changed.wait()
        if self.timeline is not None:
            what = "expert not unpacked yet" if self._handover.unpacking else "expert not read yet"
            self.timeline.add(COMPUTE, f"wait: {what}", began_ns, layer=self._outlook.layer)
        return key

    def _drain(self) -> None:
        while self._under_way or self._handover.unpacking:
            self._changed.wait()

    def _pump(self) -> None:
        """Starts reads while the reader takes more and the policy has one; names the disk's bubble when it has none."""
        reason = None
        while reason is None and self._under_way < self._supplier.max_under_way:
            found = Idle.CLOSED if self._closed else next_read(self.policy, self._outlook, *self._state())
            if isinstance(found, Idle):
                reason = found
            elif isinstance(found, Dense):
                self._start_dense(self._dense.popleft())
            else:
                self._start(found)
        if self._gaps is not None:
            self._gaps.note(None if self._under_way else reason, layer=self._outlook.layer)

    def _state(self) -> tuple[Holdings, Key | None, int | None]:
        holdings = Holdings(
            absent_LE=self._absent_LE,
            idle_LE=self._idle_LE,
            num_slots=self._slots.num_slots,
            num_free=self._slots.num_free,
            num_ahead=len(self._ahead),
            waiting=self._handover.waiting,
        )
        dense_for = self._dense[0].moe_layer if self._dense else None
        return holdings, self._pending[0] if self._pending else None, dense_for

    def _start(self, read: NextRead) -> None:
        key = read.key
        if read.is_ahead:
            self.counters.prefetched += 1
            self._ahead.add(key)
            self._guesses.add(key)
        else:
            self._pending.popleft()
        if read.evict is not None:
            self._evict(read.evict)
        slot = self._slots.reserve(key)
        self._absent_LE[key] = False
        self._under_way += 1
        self.counters.reads += 1
        self.counters.bytes_read += self._supplier.nbytes(key)
        self._supplier.start(key, slot, label="read ahead" if read.is_ahead else "read", done=self._arrived)

    def _start_dense(self, dense: _DenseRead) -> None:
        def arrived(error: Exception | None) -> None:
            with self._changed:
                self._under_way -= 1
                self._pump()
                self._changed.notify_all()
            dense.done(error)

        self._under_way += 1
        self.counters.bytes_read += len(dense.read[3])
        self._supplier.read([dense.read], arrived, label=dense.label)

    def _evict(self, key: Key) -> None:
        """An expert that is still wanted gives way to one that must compute before it, and is read again."""
        if key in self._wanted:
            self._handover.put_off(key)
            self._pending = deque(sorted([*self._pending, key]))
        self._slots.evict(key)
        self._absent_LE[key] = True
        self._idle_LE[key] = False
        self._ahead.discard(key)
        self._weights.pop(key, None)

    def _arrived(self, key: Key, weights: Weights | Packed | None, error: Exception | None) -> None:
        """On a reader thread: wakes the compute thread."""
        with self._changed:
            self._under_way -= 1
            if error is None:
                self._slots.loaded(key)
                if weights is not None:
                    self._weights[key] = weights
                if key in self._wanted:
                    self._handover.add(key, weights)
                else:
                    self._idle_LE[key] = True
                self._pump()
            else:
                self._slots.failed(key)
                self._absent_LE[key] = True
                self._ahead.discard(key)
                self._error = error
            self._changed.notify_all()

    def _unpacked(self, key: Key, error: Exception | None) -> None:
        """On a thread of the unpacker: wakes the compute thread."""
        with self._changed:
            self._handover.unpacked(key, error)
            if error is not None:
                self._error = error
            elif self.policy.order == "index":
                self._pump()
            self._changed.notify_all()

    def _laid_out(self, key: Key) -> Weights:
        weights = self._weights[key] = self._supplier.laid_out(key, self._slots.slot(key))
        return weights


def _as_weights(held: Weights | Packed) -> Weights:
    assert not isinstance(held, Packed), "a quantised expert is taken from the unpacker"
    return held
