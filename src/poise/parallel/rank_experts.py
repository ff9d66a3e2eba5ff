"""The experts that a rank holds: read from disk once, all in memory, exchanged one by one when the placement changes.

Each lies in a slot as one run of bytes (``parallel.expert_bytes``). Some slots are spare: an expert on its way in is written
there while those in use go on computing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from poise.model.arena import Arena
from poise.model.layout import ExpertSource, Weights
from poise.model.read_plan import plan_reads
from poise.model.reader import Reader
from poise.model.weights import Convert, Packed, check_bytes, stays_as_read, weights_in_slot
from poise.parallel.expert_bytes import copy_weights, run_nbytes, weights_over
from poise.predict.hits import Hits
from poise.spec.placement import Placement

Key = tuple[int, int]
"""(position among the MoE layers, expert)."""
OnLoaded = Callable[[int, int], None]
"""(experts loaded so far, of how many)."""
READER_THREADS = 2


@dataclass(slots=True)
class ReadCounters:
    """Since the rank began. Every expert that tokens come for is in memory, so that none is a hit, a miss, or read ahead."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    ahead: Hits = field(default_factory=Hits)


def experts_of(placement: Placement, rank: int) -> tuple[frozenset[int], ...]:
    """The experts of a rank, for each of the placement's layers."""
    begin, end = rank * placement.slots_per_rank, (rank + 1) * placement.slots_per_rank
    return tuple(frozenset(row_S[begin:end].tolist()) for row_S in placement.slot_to_expert_LS)


def shard_bytes(sources_LE: Sequence[Sequence[ExpertSource]], placement: Placement, *, spare_slots: int) -> int:
    """Memory that any rank's experts take, spare slots with them."""
    return (len(sources_LE) * placement.slots_per_rank + spare_slots) * slot_nbytes(sources_LE)


class RankExperts:
    """Holds at most ``capacity`` experts of ``sources_LE`` on ``device``. The computing thread uses ``layer``; one other
    thread may fill slots that it was given by ``reserve``."""

    def __init__(
        self,
        sources_LE: Sequence[Sequence[ExpertSource]],
        *,
        capacity: int,
        convert: Convert,
        device: torch.device | None = None,
    ) -> None:
        self._sources_LE = sources_LE
        self._convert = convert
        self._slot_bytes = slot_nbytes(sources_LE)
        self._memory = slot_memory(capacity, self._slot_bytes, device or torch.device("cpu"))
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: dict[Key, int] = {}
        self._held: list[dict[int, Weights]] = [{} for _ in sources_LE]
        files = [part.file for row in sources_LE for source in row for part in source.parts]
        self._reader = Reader(files, threads=READER_THREADS)
        self._converting = threading.Lock()
        self.counters = ReadCounters()

    @property
    def slot_bytes(self) -> int:
        """Of one expert, at most."""
        return self._slot_bytes

    @property
    def num_free(self) -> int:
        """Slots without an expert."""
        return len(self._free)

    def layer(self, layer: int) -> Mapping[int, Weights]:
        """The experts held of a MoE layer, by number."""
        return self._held[layer]

    def reserve(self, key: Key) -> torch.Tensor:
        """A free slot for an expert on its way in: the run of bytes to fill. ``admit`` puts it to use."""
        assert key not in self._slot_of, f"expert {key} is here already"
        self._slot_of[key] = self._free.pop()
        return self.run(key)

    def run(self, key: Key) -> torch.Tensor:
        """The bytes of an expert that is here or on its way in (uint8)."""
        nbytes = run_nbytes(self._source(key))
        return self._memory(self._slot_of[key])[:nbytes]

    def bytes_at_home(self, layer: int, expert: int) -> torch.Tensor | None:
        """The slot of an expert that computes here (uint8); None for another. Any thread."""
        slot = self._slot_of.get((layer, expert))
        return self._memory(slot) if slot is not None and expert in self._held[layer] else None

    def admit(self, key: Key) -> None:
        """The expert's bytes are there: from now on it computes."""
        self._held[key[0]][key[1]] = weights_over(self.run(key), self._source(key))

    def dismiss(self, key: Key) -> None:
        """The expert leaves, whether it computes or never arrived; its slot is free."""
        self._held[key[0]].pop(key[1], None)
        self._free.append(self._slot_of.pop(key))

    def load(self, keys: Iterable[Key], *, on_loaded: OnLoaded | None = None) -> None:
        """Reads experts from disk and admits them. Raises ReadError."""
        keys = list(keys)
        for key in keys:
            self.reserve(key)
        self.read(keys, on_loaded=on_loaded)
        for key in keys:
            self.admit(key)

    def read(self, keys: Sequence[Key], *, on_loaded: OnLoaded | None = None) -> None:
        """Fills the reserved slots of experts from disk. Raises ReadError."""
        room = threading.Semaphore(READER_THREADS + 1)
        errors: list[Exception] = []
        for count, key in enumerate(keys):
            room.acquire()
            if errors:
                room.release()
                break
            self._submit(key, room, errors)
            if on_loaded is not None:
                on_loaded(count, len(keys))
        for _ in range(READER_THREADS + 1):
            room.acquire()
        if errors:
            raise errors[0]
        if on_loaded is not None:
            on_loaded(len(keys), len(keys))

    def close(self) -> None:
        """Ends the reader threads."""
        self._reader.close()

    def _submit(self, key: Key, room: threading.Semaphore, errors: list[Exception]) -> None:
        source = self._source(key)
        plan = plan_reads(source.parts)
        staging = Arena(1, plan.nbytes)
        reads = [
            (part.file, part.file_offset, part.needed_bytes, staging.view_of(0, part.slot_offset, part.nbytes))
            for part in plan.extents
        ]

        def arrived(error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                if source.crc32 is not None:
                    check_bytes(staging, 0, source, plan)
                with self._converting:
                    self._put_in_place(key, staging)
            except Exception as failure:  # noqa: BLE001 - carried to the thread that reads
                errors.append(failure)
            finally:
                room.release()

        self._reader.submit(reads, arrived, label=("read", {"layer": key[0], "expert": key[1], "bytes": plan.nbytes}))

    def _put_in_place(self, key: Key, staging: Arena) -> None:
        """On a reader thread: what was read becomes the expert's run of bytes."""
        source = self._source(key)
        plan = plan_reads(source.parts)
        if stays_as_read(source):
            weights = weights_in_slot(staging, 0, source, plan, None, self._convert)
        else:
            place = Arena(1, self._slot_bytes)
            weights = weights_in_slot(place, 0, source, plan, staging, self._convert)
        assert not isinstance(weights, Packed), "a rank keeps experts as weights"
        copy_weights(weights, self.run(key), source)
        self.counters.bytes_read += plan.nbytes

    def _source(self, key: Key) -> ExpertSource:
        return self._sources_LE[key[0]][key[1]]


def slot_nbytes(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Of a slot that any expert fits into."""
    return max(run_nbytes(source) for row in sources_LE for source in row)


def slot_memory(slots: int, slot_bytes: int, device: torch.device) -> Callable[[int], torch.Tensor]:
    """The bytes of each of some slots, on huge pages or on a GPU."""
    if device.type == "cpu":
        arena = Arena(slots, slot_bytes)
        return lambda slot: arena.bytes_of(slot, 0, slot_bytes)
    whole = torch.empty(slots, slot_bytes, dtype=torch.uint8, device=device)
    return lambda slot: whole[slot]
