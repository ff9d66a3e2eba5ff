"""From the disk to weights in a slot: reads one expert's bytes, checks them, and makes weights of those that are none yet.

A ``Supplier`` whose tier below is the disk. ``done`` is called on a reader thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

from poise.model.arena import Arena
from poise.model.layout import ExpertSource, Weights
from poise.model.read_plan import ReadPlan, plan_reads
from poise.model.reader import Done, Label, Read, Reader
from poise.model.weights import Convert, Packed, check_bytes, scratch_bytes_for, stays_as_read, weights_in_slot
from poise.offload.expert_store import ExpertStore
from poise.offload.supplier import Loaded
from poise.plan.residency import Key
from poise.spec.timeline import DISK, Timeline


class Loader:
    """Experts of ``sources_LE``, read by ``reader_threads`` threads into slots of ``arena``."""

    def __init__(
        self, sources_LE: Sequence[Sequence[ExpertSource]], arena: Arena, *, reader_threads: int, convert: Convert
    ) -> None:
        self._sources_LE = sources_LE
        self._arena = arena
        self._convert = convert
        self._plans: dict[Key, ReadPlan] = {}
        self._checked: set[Key] = set()
        self._converting = threading.Lock()
        self.max_under_way = reader_threads + 1
        self.track = DISK
        files = [part.file for row in sources_LE for source in row for part in source.parts]
        self._reader = Reader(files, threads=reader_threads)

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._reader.is_direct

    @property
    def timeline(self) -> Timeline | None:
        """Where reads, and what is made of them, are noted, if anywhere."""
        return self._reader.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._reader.timeline = timeline

    def source(self, key: Key) -> ExpertSource:
        """Where an expert lies on disk."""
        return self._sources_LE[key[0]][key[1]]

    def nbytes(self, key: Key) -> int:
        """What is read for an expert."""
        return self._plan(key).nbytes

    def start(self, key: Key, slot: int, *, label: str, done: Loaded) -> None:
        """Queues the reads of an expert; the timeline calls them ``label``."""
        plan = self._plan(key)
        staging = None if stays_as_read(self.source(key)) else Arena(1, plan.nbytes)
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
        self._reader.submit(
            reads,
            lambda error: done(key, *self._made(key, slot, plan, staging, error)),
            label=(label, {"layer": key[0], "expert": key[1], "bytes": plan.nbytes}),
        )

    def open(self, files: Sequence[Path]) -> None:
        """Opens files of what is no expert, too. Raises ReadError."""
        self._reader.open(files)

    def read(self, reads: Sequence[Read], done: Done, *, label: Label) -> None:
        """Queues reads of what is no expert."""
        self._reader.submit(reads, done, label=label)

    def laid_out(self, key: Key, slot: int) -> Weights:
        """Tensors over the slot of an expert whose bytes are its weights. They cost tens of microseconds: the compute thread
        makes them when it first asks, and a reader thread starts the next read meanwhile."""
        weights = weights_in_slot(self._arena, slot, self.source(key), self._plan(key), None, self._convert)
        assert not isinstance(weights, Packed), f"expert {key} is quantised"
        return weights

    def resize(self, num_slots: int) -> None:
        """Gives the memory behind the slots in service back to the system."""
        if num_slots < self._arena.num_slots:
            self._arena.give_back_behind(num_slots)

    def enter(self, layer: int) -> None:
        """The disk need not know."""

    def will_use(self, experts: Sequence[int]) -> None:
        """The disk need not know."""

    def before_use(self, slot: int) -> None:
        """What has been read is there."""

    def after_use(self, slot: int) -> None:
        """The compute thread has computed when it says so."""

    def close(self) -> None:
        """Ends the reader threads. Safe to call twice."""
        self._reader.close()

    def _plan(self, key: Key) -> ReadPlan:
        return self._plans.get(key) or self._plans.setdefault(key, plan_reads(self.source(key).parts))

    def _made(
        self, key: Key, slot: int, plan: ReadPlan, staging: Arena | None, error: Exception | None
    ) -> tuple[Weights | Packed | None, Exception | None]:
        """On a reader thread, behind the read."""
        source = self.source(key)
        is_new = source.crc32 is not None and key not in self._checked
        if error is not None or (source.is_direct and not is_new):
            return None, error
        with self._noted("check" if source.is_direct else "make weights", key):
            try:
                if is_new:
                    check_bytes(self._arena, slot, source, plan)
                    self._checked.add(key)
                if source.is_direct:
                    return None, None
                with contextlib.nullcontext() if staging is None else self._converting:
                    return weights_in_slot(self._arena, slot, source, plan, staging, self._convert), None
            except Exception as failure:  # noqa: BLE001 - carried to the compute thread, raised by the store's take()
                return None, failure

    def _noted(self, name: str, key: Key) -> contextlib.AbstractContextManager[None]:
        if self.timeline is None:
            return contextlib.nullcontext()
        track = f"{DISK}: {threading.current_thread().name}"
        return self.timeline.span(track, name, layer=key[0], expert=key[1])


def open_disk_store(
    sources_LE: Sequence[Sequence[ExpertSource]],
    *,
    num_slots: int,
    slot_bytes: int,
    capacity: int,
    reader_threads: int,
    convert: Convert,
) -> ExpertStore:
    """A store in memory over the disk, ``num_slots`` slots of it in service and room for ``capacity``."""
    loader = Loader(sources_LE, Arena(capacity, slot_bytes), reader_threads=reader_threads, convert=convert)
    scratch_bytes = scratch_bytes_for(sources_LE)
    return ExpertStore([len(row) for row in sources_LE], loader, num_slots=num_slots, scratch_bytes=scratch_bytes)
