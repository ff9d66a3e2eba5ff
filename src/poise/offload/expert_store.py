"""Experts on demand: asked for as soon as a router has spoken, read behind compute, kept as the policy says.

The compute thread calls ``request`` (what this layer needs), ``take`` (the next expert that is there) and ``release``;
reader threads deliver. All state is behind one condition. Demand always goes before prefetch; the reader is given no more
than it can do at once, so that a late demand never stands behind a row of guesses.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from poise.model.arena import Arena
from poise.model.layout import ExpertSource, Weights
from poise.model.read_plan import ReadPlan, plan_reads
from poise.model.reader import Reader
from poise.model.weights import Convert, Packed, check_bytes, scratch_bytes_for, stays_as_read, weights_in_slot
from poise.offload.slots import Key, Slots, State
from poise.offload.unpacker import Unpacker
from poise.plan.residency import distance_with_foresight_LE, expected_distance_LE, updated_probability_E
from poise.plan.schedule import Policy
from poise.spec.timeline import COMPUTE, DISK, Timeline

PROBABILITY_WEIGHT = 0.2
"""Weight of the newest pass in the running chance that an expert is used."""
PREFETCH_PROBABILITY = 0.5
"""An expert is fetched unasked only when a pass is more likely than not to use it."""


@dataclass(slots=True)
class StoreCounters:
    """Since the store was made. A hit was in memory when its layer asked; ``prefetched`` counts reads nobody had
    asked for, ``prefetched_used`` those of them that were asked for before they were evicted."""

    hits: int = 0
    misses: int = 0
    reads: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    bytes_read: int = 0


class ExpertStore:
    """Holds up to ``num_slots`` experts of ``sources_LE`` in memory and reads the others when asked."""

    def __init__(
        self,
        sources_LE: Sequence[Sequence[ExpertSource]],
        *,
        num_slots: int,
        slot_bytes: int,
        capacity: int,
        reader_threads: int,
        convert: Convert,
        policy: Policy | None = None,
    ) -> None:
        self._sources_LE = sources_LE
        self._plans: dict[Key, ReadPlan] = {}
        self._arena = Arena(capacity, slot_bytes)
        self._slots = Slots(num_slots)
        self._convert = convert
        self.policy = policy or Policy()
        self._timeline: Timeline | None = None
        self._idle_since: tuple[int, str] | None = None
        files = [part.file for row in sources_LE for source in row for part in source.parts]
        self._reader = Reader(files, threads=reader_threads)
        self._max_under_way = reader_threads + 1
        self._ahead: set[Key] = set()
        self._there: deque[Key] = deque()
        self._absent_LE = np.array([[e < len(row) for e in range(max(map(len, sources_LE)))] for row in sources_LE])
        self._idle_LE = np.zeros_like(self._absent_LE)
        self._changed = threading.Condition()
        self._converting = threading.Lock()
        self._pending: deque[Key] = deque()
        self._wanted: set[Key] = set()
        self._under_way = 0
        self._checked: set[Key] = set()
        self._weights: dict[Key, Weights | Packed] = {}
        scratch_bytes = scratch_bytes_for(sources_LE)
        self._unpacker = Unpacker(scratch_bytes) if scratch_bytes else None
        self._to_unpack: deque[Key] = deque()
        self._unpacking = 0
        self._error: Exception | None = None
        self._layer = len(sources_LE) - 1
        self._used: set[int] = set()
        self._foreseen: tuple[int, npt.NDArray[np.floating]] | None = None
        self._has_foresight = False
        self._probability_LE = np.where(self._absent_LE, 0.5, 0.0)
        self._distance_LE = expected_distance_LE(self._layer, self._probability_LE)
        self._closed = False
        self.counters = StoreCounters()

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._reader.is_direct

    @property
    def timeline(self) -> Timeline | None:
        """Where reads, waits and idle times of the disk are recorded; None: nowhere."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._timeline = self._reader.timeline = timeline
        self._idle_since = None

    @property
    def num_slots(self) -> int:
        """Slots in service."""
        return self._slots.num_slots

    def request(self, layer: int, experts: Iterable[int]) -> None:
        """Says that ``layer`` (position among the MoE layers) needs these experts; reads start at once. Repeats are free."""
        with self._changed:
            if layer != self._layer or (self._used and not self._wanted):
                self._finish_layer()
                self._layer = layer
            for expert in experts:
                key = (layer, expert)
                if key in self._wanted or expert in self._used:
                    continue
                self._used.add(expert)
                self._wanted.add(key)
                self.counters.prefetched_used += key in self._ahead
                self._ahead.discard(key)
                state = self._slots.state(key)
                self._idle_LE[key] = False
                if state is State.READY:
                    self.counters.hits += 1
                    self._is_there(key)
                else:
                    self.counters.misses += 1
                if state is None:
                    self._pending.append(key)
            if self.policy.order == "index":
                self._pending = deque(sorted(self._pending))
            self._pump()

    def foresee(self, layer: int, probability_E: npt.NDArray[np.floating]) -> None:
        """Says how likely the pass uses each expert of ``layer``, the one after the layer whose every batch has just asked.

        Until that layer asks, this replaces the running chance in what is read ahead and what is evicted.
        """
        with self._changed:
            self._has_foresight = True
            if layer == self._layer or not self._used:
                return
            self._foreseen = layer, probability_E
            self._distance_LE = distance_with_foresight_LE(
                self._distance_LE, self._layer, sorted(self._used), layer, probability_E, self._probability_LE
            )
            self._pump()

    def take(self) -> tuple[int, Weights]:
        """The next expert that was asked for and is in memory, in use from now on: residents first, then as they arrive.

        Blocks until one is there. Its weights hold until it is released. Raises ReadError when the disk fails.
        """
        with self._changed:
            if self._next_there() is None:
                self._wait_for_an_expert()
            key = self._next_there()
            assert key is not None, "there is one, or the wait raised"
            self._there.remove(key)
            held = self._weights.get(key)
            if isinstance(held, Packed):
                assert self._unpacker is not None, "quantised experts need an unpacker"
                return key[1], self._unpacker.weights(key)
            self._slots.acquire(key)
        return key[1], self._laid_out(key) if held is None else held

    def _next_there(self) -> Key | None:
        """The next expert to compute, if it is there; by number, it may be one that others have overtaken."""
        if not self._there:
            return None
        if self.policy.order == "arrival":
            return self._there[0]
        first = min(self._wanted.difference(self._slots.keys(State.IN_USE)))
        return first if first in self._there else None

    def _wait_for_an_expert(self) -> None:
        began_ns = perf_counter_ns()
        while self._next_there() is None:
            if self._error is not None:
                raise self._error
            assert self._pending or self._under_way or self._unpacking, "more experts are taken than were asked for"
            self._changed.wait()
        if self.timeline is not None:
            what = "expert not unpacked yet" if self._unpacking else "expert not read yet"
            self.timeline.add(COMPUTE, f"wait: {what}", began_ns, layer=self._layer)

    def release(self, expert: int) -> None:
        """The expert of the layer at hand has computed for everyone; it may be evicted."""
        with self._changed:
            key = (self._layer, expert)
            self._slots.release(key)
            self._wanted.discard(key)
            if self._unpacker is not None:
                self._unpacker.free(key)
                self._unpack_next()
            self._idle_LE[key] = True
            self._distance_LE[key] += len(self._sources_LE)
            self._pump()

    def resize(self, num_slots: int) -> None:
        """Puts more or fewer slots into service, between passes; evicts as needed and returns their memory."""
        with self._changed:
            self._drain()
            for key in sorted(self._slots.keys(State.READY), key=self._slots.slot, reverse=True):
                if self._slots.slot(key) >= num_slots:
                    self._evict(key)
            if self._slots.shrink(num_slots):
                self._arena.give_back_behind(self._slots.num_slots)
            self._slots.grow(num_slots)

    def abandon(self) -> None:
        """Forgets what was asked for, after an aborted pass; experts in use become ready again."""
        with self._changed:
            self._pending.clear()
            self._to_unpack.clear()
            self._wanted.clear()
            self._drain()
            for key in self._slots.keys(State.IN_USE):
                self._slots.release(key)
                if self._unpacker is not None:
                    self._unpacker.free(key)
            for key in self._slots.keys(State.READY):
                self._idle_LE[key] = True
            self._there.clear()
            self._used.clear()
            self._foreseen = None
            self._error = None

    def residents(self) -> Iterator[tuple[ExpertSource, Weights | Packed]]:
        """Every expert in memory; between passes only. What was asked for is forgotten."""
        self.abandon()
        for key in self._slots.keys(State.READY):
            held = self._weights.get(key)
            yield self._source(key), self._laid_out(key) if held is None else held

    def close(self) -> None:
        """Ends the reader threads."""
        with self._changed:
            self._closed = True
            self._pending.clear()
        self._reader.close()
        if self._unpacker is not None:
            self._unpacker.close()

    def _drain(self) -> None:
        while self._under_way or self._unpacking:
            self._changed.wait()

    def _finish_layer(self) -> None:
        """Learns which experts the layer used, and moves the point from which distances are counted."""
        used_E = np.zeros(self._probability_LE.shape[1], dtype=bool)
        used_E[list(self._used)] = True
        if self._used:
            row = self._probability_LE[self._layer]
            self._probability_LE[self._layer] = updated_probability_E(row, used_E, PROBABILITY_WEIGHT)
        self._used.clear()
        self._foreseen = None
        self._ahead = {key for key in self._ahead if key[0] != self._layer}
        self._distance_LE = expected_distance_LE(self._layer, self._probability_LE)

    def _pump(self) -> None:
        """Starts reads while there is demand, a slot, and room at the reader; then prefetches."""
        reason = self._fill_reader()
        if self.timeline is None or (self._under_way > 0) == (self._idle_since is None):
            return
        if self._idle_since is None:
            self._idle_since = perf_counter_ns(), reason
        else:
            began_ns, reason = self._idle_since
            self.timeline.add(DISK, f"idle: {reason}", began_ns, layer=self._layer)
            self._idle_since = None

    def _fill_reader(self) -> str:
        """Returns why no further read was started."""
        while not self._closed and self._under_way < self._max_under_way:
            if self._pending:
                if not self._make_room(np.inf):
                    return "every slot is in use"
                self._start(self._pending.popleft())
            else:
                key = self._guess()
                if key is None:
                    return "nothing more to read ahead"
                if not self._make_room(float(self._distance_LE[key]) + 1.0):
                    return "what is in memory is needed sooner"
                self.counters.prefetched += 1
                self._ahead.add(key)
                self._start(key)
        return "closed"

    def _guess(self) -> Key | None:
        """The absent expert to read unasked, as the policy says; by default the one with the nearest expected use, if a pass
        is likely to use it and few guesses are waiting.

        Reading far ahead would turn slots that save a read in every pass into a buffer: an eighth of them at most.
        """
        read_ahead, ahead = self.policy.read_ahead, self.policy.ahead
        layers = len(self._sources_LE)
        following = (self._layer + 1) % layers
        if read_ahead == "none" or (read_ahead == "layer" and following == self._layer):
            return None
        if read_ahead == "layer":
            absent = np.flatnonzero(self._absent_LE[following])
            return (following, int(absent[0])) if len(absent) else None
        if len(self._ahead) >= (ahead or max(1, self._slots.num_slots // 8)):
            return None
        likely_LE = self._absent_LE & (self._probability_LE > PREFETCH_PROBABILITY)
        likely_LE[self._layer] = False
        if read_ahead == "foreseen" and self._has_foresight:
            likely_LE[:] = False
            if self._foreseen is not None:
                layer, chance_E = self._foreseen
                likely_LE[layer] = self._absent_LE[layer] & (chance_E > PREFETCH_PROBABILITY)
        if read_ahead == "hot":
            likely_LE = self._absent_LE & (np.arange(layers) == following)[:, None]
        nearest = int(np.where(likely_LE, self._distance_LE, np.inf).argmin())
        layer, expert = divmod(nearest, likely_LE.shape[1])
        return (layer, expert) if likely_LE[layer, expert] else None

    def _make_room(self, nearer_than: float) -> bool:
        """Frees a slot by evicting the farthest expert nobody waits for; a guess may only displace a farther one."""
        if self._slots.num_free:
            return True
        if nearer_than == np.inf and self.policy.order == "index" and not self._idle_LE.any():
            return self._put_off_the_last()
        farthest = int((self._distance_LE * self._idle_LE).argmax())
        key = divmod(farthest, self._idle_LE.shape[1])
        if not self._idle_LE[key] or (nearer_than != np.inf and self._distance_LE[key] < nearer_than):
            return False
        self._evict(key)
        return True

    def _put_off_the_last(self) -> bool:
        """By number, an expert that waits in memory for lower ones may hold the slot that those need: it is read again."""
        if not self._there or max(self._there) < self._pending[0]:
            return False
        key = max(self._there)
        self._there.remove(key)
        self._evict(key)
        self._pending = deque(sorted([*self._pending, key]))
        return True

    def _evict(self, key: Key) -> None:
        self._slots.evict(key)
        self._absent_LE[key] = True
        self._idle_LE[key] = False
        self._ahead.discard(key)
        self._weights.pop(key, None)

    def _start(self, key: Key) -> None:
        slot = self._slots.reserve(key)
        self._absent_LE[key] = False
        source = self._source(key)
        plan = self._plans.get(key) or self._plans.setdefault(key, plan_reads(source.parts))
        self._under_way += 1
        self.counters.reads += 1
        self.counters.bytes_read += plan.nbytes
        staging = None if stays_as_read(source) else Arena(1, plan.nbytes)
        into, index = (self._arena, slot) if staging is None else (staging, 0)
        reads = [
            (
                extent.file,
                extent.file_offset,
                extent.needed_bytes,
                into.view_of(index, extent.slot_offset, extent.nbytes),
            )
            for extent in plan.extents
        ]
        label = "read" if key in self._wanted else "read ahead"
        self._reader.submit(
            reads,
            lambda error: self._arrived(key, slot, plan, staging, error),
            label=(label, {"layer": key[0], "expert": key[1], "bytes": plan.nbytes}),
        )

    def _arrived(self, key: Key, slot: int, plan: ReadPlan, staging: Arena | None, error: Exception | None) -> None:
        """On a reader thread: turns bytes that are not the weights into weights, and wakes the compute thread."""
        weights: Weights | Packed | None = None
        source = self._source(key)
        if error is None:
            try:
                if source.crc32 is not None and key not in self._checked:
                    check_bytes(self._arena, slot, source, plan)
                    self._checked.add(key)
                if not source.is_direct:
                    with contextlib.nullcontext() if staging is None else self._converting:
                        weights = weights_in_slot(self._arena, slot, source, plan, staging, self._convert)
            except Exception as failure:  # noqa: BLE001 - carried to the compute thread, raised by take()
                error = failure
        with self._changed:
            self._under_way -= 1
            if error is None:
                self._slots.loaded(key)
                if weights is not None:
                    self._weights[key] = weights
                if key in self._wanted:
                    self._is_there(key)
                else:
                    self._idle_LE[key] = True
                self._pump()
            else:
                self._slots.failed(key)
                self._absent_LE[key] = True
                self._ahead.discard(key)
                self._error = error
            self._changed.notify_all()

    def _laid_out(self, key: Key) -> Weights:
        """Tensors over the slot of an expert whose bytes are its weights, made when the compute thread first asks: they cost
        tens of microseconds, in which a reader thread starts the next read."""
        plan, slot = self._plans[key], self._slots.slot(key)
        weights = weights_in_slot(self._arena, slot, self._source(key), plan, None, self._convert)
        assert not isinstance(weights, Packed), f"expert {key} is quantised"
        self._weights[key] = weights
        return weights

    def _is_there(self, key: Key) -> None:
        """Hands an expert on to the compute thread, by way of the unpacker if it is quantised."""
        if isinstance(self._weights.get(key), Packed):
            self._to_unpack.append(key)
            self._unpack_next()
        else:
            self._there.append(key)

    def _unpack_next(self) -> None:
        while self._to_unpack and self._unpacker is not None and self._unpacker.has_room:
            key = self._to_unpack.popleft()
            packed = self._weights[key]
            assert isinstance(packed, Packed), f"expert {key} is not quantised"
            self._slots.acquire(key)
            self._unpacking += 1
            self._unpacker.submit(key, packed, self._unpacked)

    def _unpacked(self, key: Key, error: Exception | None) -> None:
        """On a thread of the unpacker: wakes the compute thread."""
        with self._changed:
            self._unpacking -= 1
            if error is None:
                self._there.append(key)
            else:
                self._error = error
            self._changed.notify_all()

    def _source(self, key: Key) -> ExpertSource:
        return self._sources_LE[key[0]][key[1]]
