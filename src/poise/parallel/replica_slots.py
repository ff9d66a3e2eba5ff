"""Memory for replicas: a few expert slots on each rank, in two halves, which all layers share.

While a layer computes with one half, the other one is filled for the next layer (PROBE's double buffer: 3 replicas, 6 slots).
Slots of a GPU are filled from as much memory of the host (``parallel.replica_staging``).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from poise.model.layout import ExpertSource, Weights
from poise.model.streams import new_stream
from poise.parallel.expert_bytes import layout_of, run_nbytes, weights_over
from poise.parallel.rank_experts import slot_memory, slot_nbytes
from poise.parallel.replica_staging import Landing, host_memory


def replica_bytes(sources_LE: Sequence[Sequence[ExpertSource]], replica_slots: int) -> int:
    """Memory that a rank's replicas take."""
    return 2 * replica_slots * slot_nbytes(sources_LE)


class ReplicaSlots:
    """``replica_slots`` in each of the halves 0 and 1."""

    def __init__(
        self,
        sources_LE: Sequence[Sequence[ExpertSource]],
        *,
        replica_slots: int,
        device: torch.device | None = None,
        through_host: bool | None = None,
    ) -> None:
        """``through_host``: whether sockets reach memory of the host; None: where slots lie on a GPU."""
        device = device or torch.device("cpu")
        self.per_half = replica_slots
        self.slot_bytes = slot_nbytes(sources_LE)
        self._sources_LE = sources_LE
        self._layout_of: dict[tuple[int, int], tuple[int, int]] = {}
        """By layer and expert: bytes, and which of ``_layouts``, of which a model has one or a few."""
        self._layouts: list[Hashable] = []
        self._weights: dict[tuple[int, int, int], Weights] = {}
        """By half, place and layout: made once, as that takes longer than all else about a replica."""
        self._views: dict[tuple[int, int, int], memoryview] = {}
        """By half, place and bytes."""
        count = max(1, 2 * replica_slots)
        self._memory = slot_memory(count, self.slot_bytes, device)
        on_gpu = device.type == "cuda"
        self._host: torch.Tensor | None = None
        if on_gpu if through_host is None else through_host:
            self._host = host_memory(count, self.slot_bytes, pinned=on_gpu)
        self._stream = new_stream(device)
        self._used: list[torch.cuda.Event | None] = [None, None]
        self._in_use: int | None = None
        self._half = 0

    def turn(self) -> int:
        """The half that the next layer's replicas come into: the other one than the last time."""
        self._half ^= 1
        return self._half

    def run(self, half: int, place: int, *, layer: int, expert: int) -> torch.Tensor:
        """The bytes (uint8) that hold an expert in a slot: to be filled."""
        assert 0 <= place < self.per_half, f"slot {place} of {self.per_half}"
        nbytes, _ = self._layout(layer, expert)
        return self._memory(half * self.per_half + place)[:nbytes]

    def view(self, half: int, place: int, *, layer: int, expert: int) -> memoryview:
        """The same bytes for a socket, or those from which they are filled."""
        nbytes, _ = self._layout(layer, expert)
        view = self._views.get((half, place, nbytes))
        if view is None:
            run = self.run(half, place, layer=layer, expert=expert)
            view = (run if self._host is None else self._staged(half, place, nbytes)).numpy().data
            self._views[half, place, nbytes] = view
        return view

    def landing(self, half: int, place: int, *, layer: int, expert: int) -> Landing | None:
        """Brings what is in the view into the slot; None where that is the slot."""
        if self._host is None:
            return None
        run = self.run(half, place, layer=layer, expert=expert)
        return Landing(self._staged(half, place, len(run)), run, self._stream, self._used[half])

    def used(self) -> None:
        """A layer has been given what it computes with: the next that comes into these slots comes behind it."""
        if self._stream is not None and self._in_use is not None:
            self._used[self._in_use] = torch.cuda.current_stream(self._stream.device).record_event()
        self._in_use = None

    def weights(self, half: int, place: int, *, layer: int, expert: int) -> Weights:
        """The expert in a slot that has been filled, to compute with until ``used``."""
        self._in_use = half
        _, layout = self._layout(layer, expert)
        weights = self._weights.get((half, place, layout))
        if weights is None:
            run = self.run(half, place, layer=layer, expert=expert)
            weights = self._weights[half, place, layout] = weights_over(run, self._sources_LE[layer][expert])
        return weights

    def _layout(self, layer: int, expert: int) -> tuple[int, int]:
        known = self._layout_of.get((layer, expert))
        if known is None:
            source = self._sources_LE[layer][expert]
            layout = layout_of(source)
            if layout not in self._layouts:
                self._layouts.append(layout)
            known = self._layout_of[layer, expert] = run_nbytes(source), self._layouts.index(layout)
        return known

    def _staged(self, half: int, place: int, nbytes: int) -> torch.Tensor:
        assert self._host is not None, "sockets reach the slots themselves"
        return self._host[half * self.per_half + place][:nbytes]
