"""Keys and values of batches that are not computing lie elsewhere; two batches' share of one layer is in memory.

A cache layer of transformers is replaced by one whose ``update`` brings the past of its batch into a slot, writes the new
tokens behind it, in the slot and there, and returns views of the slot. Meanwhile the other slot is filled for the batch
that comes next. Elsewhere is a file, or DRAM behind a device (``kv_places``): each (batch, layer) has a stretch for the batch's
final length, one record per token: keys and values of all its rows side by side. So a pass reads one stretch and appends one,
whose first block is rewritten from the slot: no tail is kept in memory. Windows and recurrent states stay where they are.

Contract: one thread; an attention has ended when the next ``update`` comes. Legend: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from poise.model.cache import movable_layers
from poise.model.cache_record import CacheRecord, copy_rows
from poise.model.read_plan import ALIGNMENT
from poise.offload.kv_places import KvPlace, KvSlots, Move, Region
from poise.spec.timeline import COMPUTE, Timeline


@dataclass(slots=True)
class KvCounters:
    """Since the stream was made. ``late`` counts pasts that nobody had begun to read when they were needed."""

    bytes_read: int = 0
    bytes_written: int = 0
    late: int = 0


class _DiskLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """Stands for one layer of a cache. ``rows``: those of each record on disk; ``keep``: which of them are still wanted."""

    def __init__(self, stream: KvStream, region: Region, rows: int, final_tokens: int) -> None:
        super().__init__()
        self.stream = stream
        self.region = region
        self.rows = rows
        self.final_tokens = final_tokens
        self.tokens = 0
        self.keep: list[int] | None = None
        self.record: CacheRecord | None = None
        self.begin = 0
        """Of its stretch in the region."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past and the new tokens, shapes (B, H, T, D). The views hold until the next layer's update."""
        return self.stream.update(self, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Leaves these rows; the others are cut off when the layer is next in memory."""
        before = list(range(self.rows)) if self.keep is None else self.keep
        self.keep = [before[row] for row in beam_idx.tolist()]

    def region_bytes(self) -> int:
        """Bytes at the final length, aligned."""
        assert self.record is not None, "a layer that has seen no token has no shape"
        return _up(self.final_tokens * self.record.stride_bytes(self.rows))


@dataclass(slots=True)
class _Slot:
    """``layer``: whose past it holds, once ``job`` is done."""

    layer: _DiskLayer | None = None
    job: Move | None = None


class KvStream:
    """Caches whose attention layers lie in ``place``, which it owns."""

    def __init__(self, place: KvPlace) -> None:
        self.place = place
        self._region_of: dict[int, tuple[Any, Region]] = {}
        self._memory_of_slots: KvSlots | None = None
        self._slots = (_Slot(), _Slot())
        self._computing = 0
        self._group: list[list[_DiskLayer]] = []
        self._coming: deque[_DiskLayer] = deque()
        self._places: dict[int, list[int]] = {}
        self._place_of: dict[int, int] = {}
        self._here: list[int] = []
        self.timeline: Timeline | None = None
        self.counters = KvCounters()

    def adopt(self, model: Any, cache: DynamicCache, *, rows: int, final_tokens: int) -> None:
        """Moves an empty cache's attention layers there, for ``rows`` sequences of at most ``final_tokens`` tokens.

        Raises UsageError where no file can be made; a place that is too full says so in the first pass.
        """
        places = movable_layers(model, cache)
        if not places:
            return
        region = self.place.open()
        self._region_of[id(cache)] = cache, region
        for place in places:
            cache.layers[place] = _DiskLayer(self, region, rows, final_tokens)

    def forget(self, cache: Any) -> None:
        """Gives back the space of a cache that is used no more; any other cache is fine too."""
        if id(cache) not in self._region_of:
            return
        _, region = self._region_of.pop(id(cache))
        for slot in self._slots:
            if slot.layer is not None and slot.layer.region is region:
                slot.layer = None
            # Whatever is under way in a slot, of this cache or not, has been submitted behind all of this cache's writes.
            if slot.job is not None:
                slot.job.finish()
        self._group, self._place_of = [], {}
        self._coming.clear()
        region.close()

    def forget_all(self) -> None:
        """Gives back all the space and the slots' memory, between calls and after an error."""
        for cache, _ in list(self._region_of.values()):
            self.forget(cache)
        self._slots = (_Slot(), _Slot())
        self._memory_of_slots = None

    def close(self) -> None:
        """Gives everything back, and ends the place. Safe to call twice."""
        self.forget_all()
        self.place.close()

    def begin_pass(self, caches: Sequence[Any]) -> None:
        """Says which caches take part, in which order."""
        self._group = [[layer for layer in cache.layers if isinstance(layer, _DiskLayer)] for cache in caches]
        self._place_of = {id(layer): place for layers in self._group for place, layer in enumerate(layers)}
        self._coming.clear()
        self.place.note_in(self.timeline)

    def expect(self, stretch: int, batch: int) -> None:
        """Says which attention comes behind those already expected; its past is read as soon as a slot is free for it.

        Which layers lie in a stretch of the pass is learnt from the last attention there; until then, one in each.
        """
        layers = self._group[batch]
        is_first = not self._coming
        self._coming += [layers[place] for place in self._places.get(stretch, [stretch]) if place < len(layers)]
        if is_first and self._coming:
            self._read_ahead(self._coming[0])

    def attend(self, stretch: int) -> None:
        """A batch's attention in a stretch begins: what is updated until the next one lies in that stretch."""
        self._places[stretch] = self._here = []

    def update(
        self, layer: _DiskLayer, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``_DiskLayer.update`` returns. Raises ReadError when the disk fails, UsageError when it is too full."""
        rows, _, new_tokens, _ = keys_BHTD.shape
        record = layer.record or self._make_region(layer, keys_BHTD, values_BHTD)
        self._here.append(self._place_of[id(layer)])
        if layer in self._coming:
            while self._coming.popleft() is not layer:
                pass
        slot = self._brought_back(layer)
        end = layer.tokens + new_tokens
        assert rows == (layer.rows if layer.keep is None else len(layer.keep)), (
            "the batch has other rows than its cache"
        )
        assert end <= layer.final_tokens, f"a cache for {layer.final_tokens} tokens was given {end}"
        changed = 0 if layer.keep is not None else layer.tokens * record.stride_bytes(rows)
        if layer.keep is not None:
            assert rows <= layer.rows, "a cache gained rows"
            copy_rows(
                self._memory(slot, layer.tokens, layer.rows, record),
                self._memory(slot, layer.tokens, rows, record),
                layer.keep,
            )
            layer.rows, layer.keep = rows, None
        memory_TBW = self._memory(slot, end, rows, record)
        record.keys_BHTD(memory_TBW)[:, :, layer.tokens :].copy_(keys_BHTD)
        record.values_BHTD(memory_TBW)[:, :, layer.tokens :].copy_(values_BHTD)
        layer.tokens = end
        if self._coming:
            self._read_ahead(self._coming[0])
        self._submit(slot, layer, _down(changed), _up(end * record.stride_bytes(rows)), is_write=True)
        return record.keys_BHTD(memory_TBW), record.values_BHTD(memory_TBW)

    def _brought_back(self, layer: _DiskLayer) -> int:
        """The slot in which the layer's past is; the attention that computed before is over."""
        slot = next((place for place, slot in enumerate(self._slots) if slot.layer is layer), None)
        if slot is None:
            slot = 1 - self._computing
            self._fill(slot, layer)
            self.counters.late += layer.tokens > 0
        self._computing = slot
        job = self._slots[slot].job
        if job is not None:
            began_ns = perf_counter_ns()
            job.wait()
            if self.timeline is not None:
                self.timeline.add(COMPUTE, "wait: cache not read yet", began_ns)
        return slot

    def _read_ahead(self, layer: _DiskLayer) -> None:
        if layer.tokens and all(slot.layer is not layer for slot in self._slots):
            self._fill(1 - self._computing, layer)

    def _fill(self, slot: int, layer: _DiskLayer) -> None:
        """Gives the slot to a layer and starts to read its past. What was written from the slot has been submitted before."""
        self._slots[slot].layer = layer
        if layer.tokens:
            assert layer.record is not None, "a layer with tokens has a shape"
            self._submit(slot, layer, 0, _up(layer.tokens * layer.record.stride_bytes(layer.rows)), is_write=False)

    def _submit(self, slot: int, layer: _DiskLayer, begin: int, end: int, *, is_write: bool) -> None:
        assert layer.record is not None, "a layer without a shape has no region"
        memory = self._memory_of_slots
        assert memory is not None, "there are no slots"
        if is_write:
            self.counters.bytes_written += end - begin
        else:
            self.counters.bytes_read += end - begin
        move = self.place.move(layer.region, layer.begin + begin, memory, slot, begin, end, is_write=is_write)
        self._slots[slot].job = move

    def _memory(self, slot: int, tokens: int, rows: int, record: CacheRecord) -> torch.Tensor:
        """The first tokens of a slot, shape (T, B, record)."""
        assert self._memory_of_slots is not None, "there are no slots"
        return record.tokens_TBW(
            self._memory_of_slots.bytes_of(slot, 0, tokens * record.stride_bytes(rows)), tokens, rows
        )

    def _make_region(self, layer: _DiskLayer, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor) -> CacheRecord:
        """Takes the space and, where the slots are too small for it, makes new ones."""
        layer.record = record = CacheRecord.of(keys_BHTD, values_BHTD)
        layer.begin = layer.region.grow(layer.final_tokens * record.stride_bytes(layer.rows))
        layer.is_initialized = True
        if self._memory_of_slots is None or self._memory_of_slots.slot_bytes < layer.region_bytes():
            for slot in self._slots:
                if slot.job is not None:
                    slot.job.wait()
            self._slots = (_Slot(), _Slot())
            self._memory_of_slots = None
            self._memory_of_slots = self.place.slots(len(self._slots), layer.region_bytes())
        return record


def _down(nbytes: int) -> int:
    return nbytes // ALIGNMENT * ALIGNMENT


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
