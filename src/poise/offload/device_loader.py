"""From DRAM onto a device: a thread that copies experts into slots there, each as soon as it is in DRAM; one awaits the copies.

A ``Supplier`` whose tier below is ``HostTier``. An expert may be taken when its copy has been queued: what computes with it
waits on the device, not here (``lanes``). A copy waits in the same way for the last compute with what was in its slot before.
Few copies are queued at a time, so that an expert that is asked for late does not stand behind many that were foreseen. Who
queues copies never sleeps until one has ended: with one slot the bus would idle for that thread's waking after every expert.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

import torch

from poise.model.device_weights import laid_out_on_device, weights_nbytes
from poise.model.layout import ExpertSource, Weights
from poise.model.reader import Done, Label, Read
from poise.offload.host_tier import HostTier
from poise.offload.lanes import Lane, Mark
from poise.offload.supplier import Loaded
from poise.plan.residency import Key
from poise.spec.timeline import COPY, Timeline

QUEUED_COPIES = 2
"""One is copied, the next stands behind it, so that the way onto the device is never idle between two."""


@dataclass(slots=True)
class _Copy:
    """``slot``: what the expert is copied into, and ``after`` which mark; ``timeline``: where it is noted, if anywhere."""

    key: Key
    slot: _Slot
    weights: Weights
    after: Mark
    label: str
    done: Loaded
    timeline: Timeline | None


@dataclass(slots=True)
class _Slot:
    """Memory of the device. ``copied``: when what is there now is there; ``used``: when nobody needs it any more."""

    memory_B: torch.Tensor
    copied: Mark = None
    used: Mark = None


class DeviceLoader:
    """Slots of ``slot_bytes`` on ``device``, filled by way of ``lane`` from ``host``, which it owns."""

    def __init__(self, host: HostTier, lane: Lane, device: torch.device, *, slot_bytes: int) -> None:
        self.host = host
        self.max_under_way = QUEUED_COPIES + 1
        self.track = COPY
        self._lane = lane
        self._device = device
        self._slot_bytes = slot_bytes
        self._slots: list[_Slot] = []
        self._timeline: Timeline | None = None
        self._jobs: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        line = _Line(lane=lane, host=host)
        threads = [
            threading.Thread(target=_queue_copies, args=(self._jobs, line), name="poise-reader-to-device", daemon=True),
            threading.Thread(target=_await_copies, args=(line,), name="poise-reader-of-copies", daemon=True),
        ]
        for thread in threads:
            thread.start()
        self._end = weakref.finalize(self, _end, self._jobs, threads)
        self._end.atexit = False

    @property
    def is_direct(self) -> bool:
        """Whether reads into DRAM bypass the page cache."""
        return self.host.is_direct

    @property
    def timeline(self) -> Timeline | None:
        """Where copies, and reads from the disk, are noted, if anywhere."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._timeline = self.host.timeline = timeline

    def source(self, key: Key) -> ExpertSource:
        """Where an expert lies on disk."""
        return self.host.source(key)

    def nbytes(self, key: Key) -> int:
        """What is copied for an expert."""
        return weights_nbytes(self.host.source(key))

    def start(self, key: Key, slot: int, *, label: str, done: Loaded) -> None:
        """Has an expert copied into a slot when it is in DRAM."""
        place = self._slots[slot]
        after, timeline = place.used, self._timeline

        def there(weights: Weights | None, error: Exception | None) -> None:
            if weights is None:
                done(key, None, error)
            else:
                self._jobs.put(_Copy(key, place, weights, after, label, done, timeline))

        self.host.fetch(key, there)

    def open(self, files: Sequence[Path]) -> None:
        """Dense weights do not stream onto a device."""
        raise AssertionError("dense weights lie on the device")

    def read(self, reads: Sequence[Read], done: Done, *, label: Label) -> None:
        """Dense weights do not stream onto a device."""
        raise AssertionError("dense weights lie on the device")

    def laid_out(self, key: Key, slot: int) -> Weights:
        """Weights are told of with the copy."""
        raise AssertionError(f"expert {key} was copied without its weights")

    def resize(self, num_slots: int) -> None:
        """Takes memory of the device for more slots, or gives back that of the last."""
        if num_slots < len(self._slots):
            del self._slots[num_slots:]
        self._lane.settle()
        while len(self._slots) < num_slots:
            memory_B = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(memory_B))

    def enter(self, layer: int) -> None:
        """A layer begins to ask."""
        self.host.enter(layer)

    def will_use(self, experts: Sequence[int]) -> None:
        """What the layer at hand asks for."""
        self.host.will_use(experts)

    def before_use(self, slot: int) -> None:
        """Compute waits, on the device, for the copy."""
        self._lane.compute_waits(self._slots[slot].copied)

    def after_use(self, slot: int) -> None:
        """The next copy into the slot waits for all that compute has been told to do."""
        self._slots[slot].used = self._lane.now()

    def close(self) -> None:
        """Ends the copying thread behind what it has, and the tier below. Safe to call twice."""
        self._end()
        self._lane.settle()
        self.host.close()


@dataclass(slots=True)
class _Queued:
    """A copy that the lane has been told of; it is there at ``mark``."""

    job: _Copy
    mark: Mark
    began_ns: int


@dataclass(frozen=True, slots=True)
class _Line:
    """Copies between the thread that queues them and the one that awaits them: no more than ``room`` allows."""

    lane: Lane
    host: HostTier
    queued: queue.SimpleQueue[_Queued | None] = field(default_factory=queue.SimpleQueue)
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(QUEUED_COPIES))


def _queue_copies(jobs: queue.SimpleQueue[_Copy | None], line: _Line) -> None:
    while _queue_next(jobs, line):
        pass


def _queue_next(jobs: queue.SimpleQueue[_Copy | None], line: _Line) -> bool:
    """Queues the next copy when there is room; False for the end. Nothing of a copy is held then."""
    job = jobs.get()
    if job is None:
        line.queued.put(None)
        return False
    line.room.acquire()
    began_ns = perf_counter_ns()
    try:
        weights, copies = laid_out_on_device(job.weights, job.slot.memory_B)
        job.slot.copied = mark = line.lane.copy(copies, after=job.after)
    except Exception as error:  # noqa: BLE001 - carried to the compute thread, raised by the store's take()
        line.room.release()
        line.host.give_back(job.key)
        job.done(job.key, None, error)
        return True
    line.queued.put(_Queued(job, mark, began_ns))
    job.done(job.key, weights, None)
    return True


def _await_copies(line: _Line) -> None:
    while _await_next(line):
        pass


def _await_next(line: _Line) -> bool:
    """Waits for the first copy that is queued; False for the end."""
    first = line.queued.get()
    if first is None:
        return False
    line.lane.host_waits(first.mark)
    line.room.release()
    job = first.job
    line.host.give_back(job.key)
    if job.timeline is not None:
        nbytes = weights_nbytes(line.host.source(job.key))
        job.timeline.add(COPY, job.label, first.began_ns, layer=job.key[0], expert=job.key[1], bytes=nbytes)
    return True


def _end(jobs: queue.SimpleQueue[_Copy | None], threads: Sequence[threading.Thread]) -> None:
    jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # a collection of garbage may run on any thread
            thread.join()
