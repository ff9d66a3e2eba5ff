"""Memory for replicas: a few expert slots on each rank, in two halves, which all layers share.

While a layer computes with one half, the other one is filled for the next layer (PROBE's double buffer: 3 replicas, 6 slots).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from poise.model.layout import ExpertSource, Weights
from poise.parallel.expert_bytes import run_nbytes, weights_over
from poise.parallel.rank_experts import slot_memory, slot_nbytes


def replica_bytes(sources_LE: Sequence[Sequence[ExpertSource]], replica_slots: int) -> int:
    """Memory that a rank's replicas take."""
    return 2 * replica_slots * slot_nbytes(sources_LE)


class ReplicaSlots:
    """``replica_slots`` in each of the halves 0 and 1."""

    def __init__(
        self, sources_LE: Sequence[Sequence[ExpertSource]], *, replica_slots: int, device: torch.device | None = None
    ) -> None:
        self.per_half = replica_slots
        self.slot_bytes = slot_nbytes(sources_LE)
        self._sources_LE = sources_LE
        self._nbytes: dict[tuple[int, int], int] = {}
        self._memory = slot_memory(max(1, 2 * replica_slots), self.slot_bytes, device or torch.device("cpu"))

    def run(self, half: int, place: int, *, layer: int, expert: int) -> torch.Tensor:
        """The bytes (uint8) that hold an expert in a slot: to be filled."""
        assert 0 <= place < self.per_half, f"slot {place} of {self.per_half}"
        nbytes = self._nbytes.get((layer, expert))
        if nbytes is None:
            nbytes = self._nbytes[layer, expert] = run_nbytes(self._sources_LE[layer][expert])
        return self._memory(half * self.per_half + place)[:nbytes]

    def view(self, half: int, place: int, *, layer: int, expert: int) -> memoryview:
        """The same bytes for a socket."""
        return self.run(half, place, layer=layer, expert=expert).numpy().data

    def weights(self, half: int, place: int, *, layer: int, expert: int) -> Weights:
        """The expert in a slot that has been filled."""
        return weights_over(self.run(half, place, layer=layer, expert=expert), self._sources_LE[layer][expert])
