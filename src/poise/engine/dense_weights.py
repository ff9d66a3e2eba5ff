"""The dense weights of a loaded model: which decoder layers' stay in memory, which stream, and changing that between calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from poise.engine.footprint import give_back_freed_memory
from poise.errors import UsageError
from poise.model.checkpoint import Checkpoint
from poise.model.decoder_layers import DecoderLayer, find_decoder_layers, put_back, take_out
from poise.model.dense import as_tensor, dense_nbytes, load_dense, read_tensor
from poise.model.inspect import ExpertsModule
from poise.model.layout import CheckpointLayout
from poise.offload.dense_stream import DenseStream, Disk, slot_bytes_for
from poise.plan.dense import DensePlan, DenseSpec, dense_ways, stream_layers

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayers:
    """A model's decoder layers, and the ways in which their dense weights may lie, from most memory to least."""

    layers: Sequence[DecoderLayer]
    ways: tuple[DensePlan, ...]

    def streamed(self, plan: DensePlan) -> list[DecoderLayer]:
        """The layers that stream, in order."""
        return [self.layers[layer] for layer in plan.streamed]


def find_dense_layers(
    model: Any,
    modules: Sequence[ExpertsModule],
    layout: CheckpointLayout,
    dtype: torch.dtype,
    *,
    dense_layers: int | None,
    kept: Collection[str] = (),
) -> DenseLayers:
    """``dense_layers``: decoder layers whose dense weights stay in memory; None: any number, as the planner chooses.

    ``kept``: parameters that stay in any case.

    Raises UsageError for a number of layers that the model does not have.
    """
    layers = find_decoder_layers(model, modules, layout, dtype, kept=kept)
    if dense_layers is not None and not 0 <= dense_layers <= len(layers):
        raise UsageError(f"dense_layers is {dense_layers}; the model has {len(layers)} layers: give 0 to {len(layers)}")
    spec = DenseSpec(
        total_bytes=dense_nbytes(model),
        bytes_L=tuple(layer.nbytes for layer in layers),
        slot_bytes_L=tuple(map(slot_bytes_for, layers)),
    )
    ways = dense_ways(spec) if dense_layers is None else (stream_layers(spec, dense_layers),)
    return DenseLayers(layers=layers, ways=ways)


class DenseWeights:
    """Owns what ``plan`` says: parameters in memory for the layers that stay, a stream for the others."""

    def __init__(self, model: nn.Module, layers: DenseLayers, plan: DensePlan, disk: Disk) -> None:
        """``model``: all its dense weights are there but those that ``plan`` streams, which lie on the meta device."""
        self._model, self._layers, self.plan, self._disk = model, layers, plan, disk
        self.stream = self._opened()

    def change(self, plan: DensePlan) -> None:
        """Between passes: drops what shall stream, reads what shall stay. The memory of both plans is never held at once.

        Raises ReadError when the disk fails; the model cannot run then, and ``close`` is all that may follow.
        """
        before, after = set(self.plan.streamed), set(plan.streamed)
        self.close()
        for place in sorted(after - before):
            for name in self._layers.layers[place].parts:
                self._put(name, torch.empty_like(self._model.get_parameter(name), device="meta"))
        give_back_freed_memory()
        for place in sorted(before - after):
            self._read(self._layers.layers[place])
        self.plan = plan
        self.stream = self._opened()

    def close(self) -> None:
        """Ends the stream, if there is one. Safe to call twice."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _opened(self) -> DenseStream | None:
        streamed = self._layers.streamed(self.plan)
        return DenseStream(self._model, streamed, self._disk) if streamed else None

    def _read(self, layer: DecoderLayer) -> None:
        """A layer's weights in one block, so that the system gets it back whole when they are dropped."""
        sizes = [-(-ref.nbytes // ALIGNMENT) * ALIGNMENT for ref in layer.parts.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        for (name, ref), place in zip(layer.parts.items(), torch.split(block, sizes), strict=True):
            values = as_tensor(place[: ref.nbytes], ref)
            self._put(name, values.copy_(read_tensor(ref)))

    def _put(self, name: str, values: torch.Tensor) -> None:
        path, _, key = name.rpartition(".")
        self._model.get_submodule(path)._parameters[key] = nn.Parameter(values, requires_grad=False)


def load_resident(
    model: Any,
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    dtype: torch.dtype,
    device: torch.device,
    streamed: Sequence[DecoderLayer],
) -> None:
    """Loads the dense weights that stay; those that stream are not read and keep their place on the meta device."""
    names = [name for layer in streamed for name in layer.parts]
    refs = {ref.name for layer in streamed for ref in layer.parts.values()}
    take_out(model, names)
    load_dense(model, checkpoint, layout, dtype, device, leave_out=refs)
    put_back(model, names)
