"""Where keys and values lie that have left the memory that computes, and how their bytes come and go: files, or DRAM.

A place does its moves in the order in which they are asked for. Files are for caches that leave DRAM, by a thread that reads
and writes; DRAM is for those that leave a device, by a lane. All but that thread's work is for the thread that computes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from poise.model.arena import Arena
from poise.model.read_plan import ALIGNMENT
from poise.offload.lanes import Lane, Mark
from poise.offload.pinned import Pinned
from poise.offload.scratch import Job, Scratch, ScratchThread
from poise.spec.timeline import Timeline


class Move(Protocol):
    """Bytes under way."""

    def wait(self) -> None:
        """What compute is told from now on finds them there. Raises ReadError when they cannot be."""
        ...

    def finish(self) -> None:
        """Until they are there, or never will be."""
        ...


class Region(Protocol):
    """What one cache takes in a place."""

    def grow(self, nbytes: int) -> int:
        """Takes so much more, rounded up to the alignment; returns where it begins.

        Raises UsageError where there is no room.
        """
        ...

    def close(self) -> None:
        """Gives it back; nothing moves to or from it. Safe to call twice."""
        ...


class KvSlots(Protocol):
    """Memory that computes, for two batches' share of one layer."""

    slot_bytes: int

    def bytes_of(self, slot: int, offset: int, nbytes: int) -> torch.Tensor:
        """A stretch of a slot, uint8 of shape (nbytes,)."""
        ...


class KvPlace(Protocol):
    """One for each stream of caches."""

    def open(self) -> Any:
        """A ``Region`` of this place for a cache. Raises UsageError where none can be made."""
        ...

    def slots(self, count: int, nbytes: int) -> Any:
        """``KvSlots`` that this place can move to and from."""
        ...

    def move(self, region: Any, at: int, slots: Any, slot: int, begin: int, end: int, *, is_write: bool) -> Move:
        """Bytes ``begin`` to ``end`` of a slot to ``at`` in a region, or back, behind all that compute has been told to do."""
        ...

    def note_in(self, timeline: Timeline | None) -> None:
        """Where moves are noted from now on, if anywhere."""
        ...

    def close(self) -> None:
        """Ends it when nothing is under way. Safe to call twice."""
        ...


class FilePlace:
    """Unnamed files in ``directory``, one for each cache."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._thread = ScratchThread()
        self._timeline: Timeline | None = None

    def open(self) -> Scratch:
        """A file. Raises UsageError where none can be made."""
        return Scratch(self.directory)

    def slots(self, count: int, nbytes: int) -> Arena:
        """Memory that the kernel reads into without a copy."""
        return Arena(count, nbytes)

    def move(self, region: Scratch, at: int, slots: Arena, slot: int, begin: int, end: int, *, is_write: bool) -> Job:
        """Has the thread read or write; offsets are multiples of the alignment."""
        job = Job(region, is_write, at, slots.view_of(slot, begin, end - begin), self._timeline)
        self._thread.submit(job)
        return job

    def note_in(self, timeline: Timeline | None) -> None:
        """Where reads and writes are noted."""
        self._timeline = timeline

    def close(self) -> None:
        """Ends the thread."""
        self._thread.close()


@dataclass(frozen=True, slots=True)
class _Copied:
    lane: Lane
    mark: Mark

    def wait(self) -> None:
        self.lane.compute_waits(self.mark)

    def finish(self) -> None:
        self.lane.host_waits(self.mark)


class _DeviceSlots:
    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self.slot_bytes = nbytes
        self._slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]

    def bytes_of(self, slot: int, offset: int, nbytes: int) -> torch.Tensor:
        return self._slots[slot][offset : offset + nbytes]


class _Pool:
    """Stretches of pinned memory. What is given back is kept for the next of its size, until another size is asked for."""

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._free: dict[int, list[tuple[Arena, Pinned | None]]] = {}

    def take(self, nbytes: int) -> tuple[Arena, Pinned | None]:
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        self.empty()
        arena = Arena(1, nbytes)
        return arena, Pinned(arena.bytes_of(0, 0, nbytes)) if self._is_pinned else None

    def give_back(self, nbytes: int, memory: tuple[Arena, Pinned | None]) -> None:
        self._free.setdefault(nbytes, []).append(memory)

    def empty(self) -> None:
        for _, pinned in itertools.chain.from_iterable(self._free.values()):
            if pinned is not None:
                pinned.close()
        self._free.clear()


class _DramRegion:
    """Stretches, one for each layer, in one row of addresses."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._stretches: dict[int, tuple[int, tuple[Arena, Pinned | None]]] = {}
        self._end = 0

    def grow(self, nbytes: int) -> int:
        begin, nbytes = self._end, -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._stretches[begin] = nbytes, self._pool.take(nbytes)
        self._end += nbytes
        return begin

    def bytes_at(self, at: int, nbytes: int) -> torch.Tensor:
        begin = max(each for each in self._stretches if each <= at)
        there, (arena, _) = self._stretches[begin]
        assert at + nbytes <= begin + there, "a copy reaches past what is pinned"
        return arena.bytes_of(0, at - begin, nbytes)

    def close(self) -> None:
        for nbytes, memory in self._stretches.values():
            self._pool.give_back(nbytes, memory)
        self._stretches.clear()


class DramPlace:
    """DRAM, pinned where a GPU computes, by way of a ``lane`` that nothing else uses."""

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self._lane = lane
        self._device = device
        self._pool = _Pool(is_pinned=device.type == "cuda")

    def open(self) -> _DramRegion:
        """Takes memory as it grows."""
        return _DramRegion(self._pool)

    def slots(self, count: int, nbytes: int) -> _DeviceSlots:
        """Memory of the device."""
        return _DeviceSlots(count, nbytes, self._device)

    def move(
        self, region: _DramRegion, at: int, slots: _DeviceSlots, slot: int, begin: int, end: int, *, is_write: bool
    ) -> _Copied:
        """Queues a copy behind all copies before, and all that compute has been told to do."""
        there, here = region.bytes_at(at, end - begin), slots.bytes_of(slot, begin, end - begin)
        return _Copied(
            self._lane, self._lane.copy([(there, here) if is_write else (here, there)], after=self._lane.now())
        )

    def note_in(self, timeline: Timeline | None) -> None:
        """Copies of caches are not noted."""

    def close(self) -> None:
        """Gives the memory back."""
        self._lane.settle()
        self._pool.empty()
