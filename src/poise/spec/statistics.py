"""What an engine or a trace says of the load: how many tokens each expert got, step by step or window by window.

``ExpertStatistics`` is what every reader returns and planners start from. ``EXPERT_LOG`` is the one file of this kind that is
our own: what the vLLM plug-in logs. vLLM counts MoE layers only, so its layers are places among those, not absolute ids;
``with_absolute_layers`` says which they are. Letters: N steps, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.errors import TraceError
from poise.spec.tensor_file import TensorFormat
from poise.spec.trace import RoutingTrace

Floats = npt.NDArray[np.float64]

EXPERT_LOG = TensorFormat(
    kind="expert log",
    version=1,
    required={"load": ("F32", 3)},
    fields={"engine": str, "window_steps": int},
    remedy="the vLLM plug-in writes it where POISE_EXPERT_LOG says",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertStatistics:
    """``load_NLE``: tokens that chose each expert in each step (or on average in each window). Raises TraceError.

    ``layers``: absolute ids, or where ``are_absolute`` is False places among the MoE layers. ``num_layers``: all layers of the
    model, dense ones too; None where the file does not say. ``source``: the format, for people.
    """

    load_NLE: npt.NDArray[Any]
    layers: tuple[int, ...]
    source: str
    num_layers: int | None = None
    are_absolute: bool = True

    def __post_init__(self) -> None:
        shape = self.load_NLE.shape
        assert len(shape) == 3, f"load has the shape {shape}, not (steps, layers, experts)"
        if min(shape) < 1:
            raise TraceError(
                f"its counts have the shape {shape} (steps, layers, experts): there is nothing to place by"
            )
        if not bool(np.isfinite(self.load_NLE).all()) or bool((self.load_NLE < 0).any()):
            raise TraceError("it has a count below 0 or one that is no number; record anew")
        if len(self.layers) != shape[1]:
            raise TraceError(f"it counts {shape[1]} layers and {len(self.layers)} have ids")

    @property
    def load_LE(self) -> Floats:
        """Mean tokens of a step for each expert."""
        return np.asarray(self.load_NLE.mean(axis=0, dtype=np.float64))

    @property
    def steps(self) -> int:
        return int(self.load_NLE.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load_NLE.shape[2])

    def with_absolute_layers(self, first: int) -> ExpertStatistics:
        """The same with ids from ``first`` on, where layers were places among the MoE layers; they lie one behind the other."""
        if self.are_absolute:
            return self
        return replace(self, layers=tuple(first + place for place in self.layers), are_absolute=True)


def from_trace(trace: RoutingTrace) -> ExpertStatistics:
    """A routing trace's counts, step by step."""
    return ExpertStatistics(load_NLE=trace.counts_NLE, layers=trace.layers, source="routing trace")


def write_expert_log(path: Path, load_NLE: npt.NDArray[np.float32], *, engine: str, window_steps: int) -> None:
    """Mean tokens of a step for each of N windows, whole or not at all. Raises TraceError if it cannot be written."""
    EXPERT_LOG.save(path, {"load": load_NLE}, {"engine": engine, "window_steps": window_steps})


def read_expert_log(path: Path) -> ExpertStatistics:
    """Raises TraceError, one line, for anything but an expert log of version 1. Windows without load are left out."""
    tensors, fields = EXPERT_LOG.load(path)
    load_NLE = tensors["load"]
    try:
        return ExpertStatistics(
            load_NLE=load_NLE[load_NLE.any(axis=(1, 2))],
            layers=tuple(range(load_NLE.shape[1])),
            source=f"{fields['engine']} expert log",
            are_absolute=False,
        )
    except TraceError as error:
        raise EXPERT_LOG.refusal(path, f"is of no use: {error}") from None
