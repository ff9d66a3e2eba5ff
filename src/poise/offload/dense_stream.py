"""Dense weights of decoder layers, read layer by layer through a few slots, behind compute.

A hook before each streamed layer stops every batch of a pass at a door (``model.seam``). When all are there, ``enter``: the
layer before is left by everyone, its slot takes the next read, and the layer's parameters are laid over its own slot. Outside
a pass a single forward goes through of itself. Outside its turn a streamed parameter lies on the meta device, so that a use
at the wrong time fails. Embeddings, the head, buffers and what is no plain tensor on disk are not here: they stay in memory
(``model.decoder_layers``).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Protocol

from torch import nn

from poise.model.arena import Arena
from poise.model.decoder_layers import DecoderLayer
from poise.model.dense import as_tensor
from poise.model.read_plan import Extent, ReadPlan, plan_reads
from poise.model.reader import Done, Label, Read
from poise.model.seam import wait_for_the_others
from poise.plan.dense import NUM_SLOTS
from poise.spec.timeline import COMPUTE, Timeline
from poise.units import MIB

PIECE_BYTES = 8 * MIB
"""A layer is read in pieces of this size at most, so that an expert that a layer waits for comes between them."""


class Disk(Protocol):
    """Who reads: ``offload.expert_store``, which puts dense weights and experts into one order."""

    def open(self, files: Sequence[Path]) -> None: ...

    def read_dense(self, read: Read, done: Done, *, label: Label, moe_layer: int) -> None: ...


@dataclass(slots=True)
class DenseCounters:
    """Since the stream was made. ``late`` counts the layers that were not there when their turn came."""

    reads: int = 0
    bytes_read: int = 0
    late: int = 0


@dataclass(slots=True)
class _Slot:
    """``layer``: position among the streamed layers of what it holds or is being read into it; None when empty.

    ``under_way``: pieces that are not there yet. ``error``: why its last read failed.
    """

    layer: int | None = None
    under_way: int = 0
    error: Exception | None = None

    @property
    def is_loading(self) -> bool:
        return self.under_way > 0


def slot_bytes_for(layer: DecoderLayer) -> int:
    """Bytes a slot needs to take the layer's dense weights."""
    return plan_reads(list(layer.parts.values())).nbytes


class DenseStream:
    """Streams the dense weights of ``layers`` (in the order in which a pass comes to them) from ``disk`` into ``model``.

    Their parameters must be registered and on the meta device. The hooks stay until ``close``.
    """

    def __init__(self, model: nn.Module, layers: Sequence[DecoderLayer], disk: Disk) -> None:
        assert len(layers) > NUM_SLOTS, "so few layers take no more memory than their slots"
        self._plans = [plan_reads(list(layer.parts.values())) for layer in layers]
        self._arena = Arena(NUM_SLOTS, max(plan.nbytes for plan in self._plans))
        self._slots = [_Slot() for _ in range(NUM_SLOTS)]
        self.names = tuple(layer.name for layer in layers)
        self.moe_layers = tuple(layer.moe_layer for layer in layers)
        self._parameters_LS = [
            [_laid_out(model, layer, plan, self._arena, slot) for slot in range(NUM_SLOTS)]
            for layer, plan in zip(layers, self._plans, strict=True)
        ]
        self._absent_L = [[model.get_parameter(name) for name in layer.parts] for layer in layers]
        self._owners_L = [
            [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in layer.parts]
            for layer in layers
        ]
        self._disk = disk
        self.timeline: Timeline | None = None
        """Where waits are noted, if anywhere."""
        self._changed = threading.Condition()
        self._current: int | None = None
        self._is_in_pass = False
        self.counters = DenseCounters()
        self._hooks = [
            model.get_submodule(layer.name).register_forward_pre_hook(functools.partial(self._at_door, position))
            for position, layer in enumerate(layers)
        ]
        disk.open([ref.file for layer in layers for ref in layer.parts.values()])
        self._read_ahead(0)

    def begin_pass(self) -> None:
        """From now on batches stop at doors."""
        self._is_in_pass = True

    def end_pass(self) -> None:
        """All batches have ended, or were aborted: the first layers of the next pass are read."""
        self._is_in_pass = False
        self._leave()
        self._read_ahead(0)

    def close(self) -> None:
        """Takes the hooks off and waits for reads under way; the layers cannot run any more. Safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._leave()
        with self._changed:
            while any(slot.is_loading for slot in self._slots):
                self._changed.wait()

    def _at_door(self, position: int, module: nn.Module, arguments: Any) -> None:
        if self._is_in_pass:
            wait_for_the_others()
            assert self._current == position, (
                f"a batch goes into streamed layer {position} while {self._current} is there"
            )
        else:
            self.enter(position)

    def enter(self, position: int) -> None:
        """The turn of a streamed layer: its weights are there when this returns. Raises ReadError when the disk fails."""
        self._leave()
        with self._changed:
            if not any(slot.layer == position and not slot.is_loading for slot in self._slots):
                self.counters.late += 1
            self._read_ahead(position)
            began_ns = perf_counter_ns()
            while any(slot.layer == position and slot.is_loading for slot in self._slots):
                self._changed.wait()
            if self.timeline is not None:
                self.timeline.add(COMPUTE, "wait: dense layer not read yet", began_ns)
            index = next((place for place, slot in enumerate(self._slots) if slot.layer == position), None)
            if index is None:
                raise next(slot.error for slot in self._slots if slot.error is not None)
        self._current = position
        self._point(position, self._parameters_LS[position][index])

    def _leave(self) -> None:
        if self._current is not None:
            self._point(self._current, self._absent_L[self._current])
            self._current = None

    def _point(self, position: int, parameters: Sequence[nn.Parameter]) -> None:
        for (module, key), parameter in zip(self._owners_L[position], parameters, strict=True):
            module._parameters[key] = parameter

    def _read_ahead(self, position: int) -> None:
        """Starts the reads of this layer and of those behind it, a slot each, where they are not there or failed."""
        wanted = [(position + ahead) % len(self._plans) for ahead in range(NUM_SLOTS)]
        with self._changed:
            for layer in wanted:
                if any(slot.layer == layer for slot in self._slots):
                    continue
                index = next(place for place, slot in enumerate(self._slots) if slot.layer not in wanted)
                # After an aborted pass a slot may still be read into for a layer whose turn is not now.
                while self._slots[index].is_loading:
                    self._changed.wait()
                self._start(layer, index)

    def _start(self, layer: int, index: int) -> None:
        plan, slot = self._plans[layer], self._slots[index]
        pieces = [piece for extent in plan.extents for piece in self._pieces(extent, index)]
        slot.layer, slot.under_way, slot.error = layer, len(pieces), None
        self.counters.reads += 1
        self.counters.bytes_read += plan.nbytes
        for piece in pieces:
            label = "read dense", {"streamed": layer, "bytes": len(piece[3])}
            arrived = functools.partial(self._arrived, slot)
            self._disk.read_dense(piece, arrived, label=label, moe_layer=self.moe_layers[layer])

    def _pieces(self, extent: Extent, index: int) -> Iterator[Read]:
        for begin in range(0, extent.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, extent.nbytes - begin)
            memory = self._arena.view_of(index, extent.slot_offset + begin, nbytes)
            yield extent.file, extent.file_offset + begin, min(nbytes, extent.needed_bytes - begin), memory

    def _arrived(self, slot: _Slot, error: Exception | None) -> None:
        """On a reader thread."""
        with self._changed:
            slot.under_way -= 1
            slot.error = slot.error or error
            if slot.error is not None and not slot.under_way:
                slot.layer = None
            self._changed.notify_all()


def _laid_out(model: nn.Module, layer: DecoderLayer, plan: ReadPlan, arena: Arena, slot: int) -> list[nn.Parameter]:
    """The layer's parameters over a slot, in the order of its parts."""
    parameters = []
    for ref in layer.parts.values():
        values = as_tensor(arena.bytes_of(slot, plan.slot_offsets[ref], ref.nbytes), ref)
        parameters.append(nn.Parameter(values, requires_grad=False))
    return parameters
