"""What is streamed besides experts: decoder layers' dense weights, and keys and values. Chooses and opens; ``LLM`` owns.

Dense weights stream of themselves when they take too much of the budget; keys and values leave memory when they are told to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poise.errors import BudgetError, UsageError
from poise.model.checkpoint import Checkpoint
from poise.model.decoder_layers import DecoderLayer, find_decoder_layers, put_back, take_out
from poise.model.dense import dense_nbytes, load_dense
from poise.model.inspect import ExpertsModule
from poise.model.layout import CheckpointLayout
from poise.offload.dense_stream import DenseStream, slot_bytes_for
from poise.offload.kv_stream import KvStream
from poise.offload.scratch import too_full
from poise.plan.dense import DensePlan, DenseSpec, plan_dense, smallest_plan, smallest_room_bytes, stream_layers
from poise.profile.mounts import in_memory
from poise.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseChoice:
    """Which of ``layers`` stream. ``is_automatic``: the budget says so, and another budget may say otherwise."""

    layers: Sequence[DecoderLayer]
    spec: DenseSpec
    plan: DensePlan
    is_automatic: bool

    @property
    def streamed(self) -> list[DecoderLayer]:
        """The layers that stream, in order."""
        return [self.layers[layer] for layer in self.plan.streamed]

    @property
    def smallest_bytes(self) -> int:
        """What dense weights take at least."""
        return smallest_plan(self.spec).memory_bytes if self.is_automatic else self.plan.memory_bytes

    def corrected(self, error: BudgetError, *, budget_bytes: int, fixed_bytes: int) -> BudgetError:
        """The error of a plan made beside this choice, for the budget that works when the choice follows it.

        ``fixed_bytes``: of the budget, what neither dense weights nor the work on a request takes.
        """
        if not self.is_automatic:
            return error
        working = error.smallest_bytes - self.plan.memory_bytes - fixed_bytes
        needed = fixed_bytes + smallest_room_bytes(self.spec, working)
        return BudgetError(
            f"a memory budget of {format_bytes(budget_bytes)} is too small; the smallest that works is {needed} bytes "
            f"({format_bytes(needed)}), of which {format_bytes(working)} for one expert, caches and activations",
            smallest_bytes=needed,
        )


def choose_dense(
    model: Any,
    modules: Sequence[ExpertsModule],
    layout: CheckpointLayout,
    dtype: torch.dtype,
    *,
    dense_layers: int | None,
    room_bytes: int,
) -> DenseChoice:
    """``dense_layers``: decoder layers whose dense weights stay in memory; None: as many as ``room_bytes`` allow.

    Raises UsageError for a number of layers that the model does not have.
    """
    layers = find_decoder_layers(model, modules, layout, dtype)
    if dense_layers is not None and not 0 <= dense_layers <= len(layers):
        raise UsageError(f"dense_layers is {dense_layers}; the model has {len(layers)} layers: give 0 to {len(layers)}")
    spec = DenseSpec(
        total_bytes=dense_nbytes(model),
        bytes_L=tuple(layer.nbytes for layer in layers),
        slot_bytes_L=tuple(map(slot_bytes_for, layers)),
    )
    plan = plan_dense(spec, room_bytes=room_bytes) if dense_layers is None else stream_layers(spec, dense_layers)
    return DenseChoice(layers=layers, spec=spec, plan=plan, is_automatic=dense_layers is None)


def load_resident(
    model: Any,
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    dtype: torch.dtype,
    device: torch.device,
    choice: DenseChoice,
) -> None:
    """Loads the dense weights that stay; those that stream are not read and keep their place on the meta device."""
    names = [name for layer in choice.streamed for name in layer.parts]
    refs = {ref.name for layer in choice.streamed for ref in layer.parts.values()}
    take_out(model, names)
    load_dense(model, checkpoint, layout, dtype, device, leave_out=refs)
    put_back(model, names)


def open_dense(model: Any, choice: DenseChoice) -> DenseStream | None:
    """The stream of the layers that do not stay; None where all do."""
    return DenseStream(model, choice.streamed) if choice.plan.streamed else None


def open_kv(directory: str | Path | None) -> KvStream:
    """``directory``: where scratch files go; None: where temporary files go. Raises UsageError for what is no disk."""
    path = Path(tempfile.gettempdir() if directory is None else directory)
    if not path.is_dir():
        raise UsageError(f"scratch_directory {path} is no directory; give one on a disk")
    if in_memory(path):
        raise UsageError(
            f"{path} is memory, so keys and values would not leave it; give a scratch_directory on a disk, or set TMPDIR"
        )
    if not os.access(path, os.W_OK):
        raise UsageError(f"scratch_directory {path} cannot be written to; give another")
    return KvStream(path)


def can_hold_kv(directory: str | Path | None) -> bool:
    """Whether ``open_kv`` would take the directory."""
    path = Path(tempfile.gettempdir() if directory is None else directory)
    return path.is_dir() and not in_memory(path) and os.access(path, os.W_OK)


def refuse_if_disk_is_full(kv: KvStream, nbytes: int) -> None:
    """Before anything runs: raises UsageError when the caches of the rows that run at once do not fit on the disk."""
    status = os.statvfs(kv.directory)
    if nbytes > status.f_bavail * status.f_frsize:
        raise too_full(kv.directory, nbytes)
