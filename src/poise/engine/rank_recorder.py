"""Takes down what this rank does in every layer of every pass, and now and then tells the other ranks.

A few microseconds a layer, a message every ``INTERVAL`` passes, memory for that many. What is told are the fields of
``LayerRecord`` and of its ``StepNote``: one that is added there is told too, and ``report`` decides what becomes of it.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch

from poise.parallel.group import RankGroup
from poise.parallel.moe_layer import LayerRecord
from poise.parallel.step_note import StepNote
from poise.report.rank_figures import RankFigures, figures_of
from poise.report.step_figures import StepFigures, step_figures_of

INTERVAL = 64
"""Passes between two messages."""
OWN = tuple(each.name for each in fields(LayerRecord) if each.name not in ("layer", "note"))
NOTED = tuple(each.name for each in fields(StepNote))
NAMES = OWN + NOTED


class RankRecorder:
    """Of one rank, since ``begin``. Passes are counted alike on all ranks, so all come to ``gather`` together."""

    def __init__(self, group: RankGroup, num_layers: int) -> None:
        self._group = group
        self._values = attrgetter(*OWN, *(f"note.{name}" for name in NOTED))
        self._layers_PLF = np.zeros((INTERVAL, num_layers, len(NAMES)))
        self._passes_P2 = np.zeros((INTERVAL, 2))
        self._passes = 0
        self._parts: list[RankFigures] = []
        self._steps: list[StepFigures] = []
        self.balances_steps = False
        """Whether there is anything to say of that."""

    @property
    def is_full(self) -> bool:
        """Whether ranks must ``gather`` before the next pass."""
        return self._passes == INTERVAL

    @property
    def figures(self) -> RankFigures | None:
        """Of what was gathered since ``begin``, on rank 0; None before, and on the others."""
        return RankFigures.joined(self._parts) if self._parts else None

    @property
    def step_figures(self) -> StepFigures | None:
        """Likewise, of what balancing each step did; None where that is not done."""
        return StepFigures.joined(self._steps) if self._steps else None

    def begin(self) -> None:
        """Forgets everything."""
        self._parts.clear()
        self._steps.clear()
        self._passes = 0
        self._layers_PLF[:] = 0

    def take(self, record: LayerRecord) -> None:
        """A layer of the pass at hand; of one in halves, both."""
        self._layers_PLF[self._passes, record.layer] += self._values(record)

    def end_pass(self, *, pass_s: float, agreed_s: float) -> None:
        """The pass at hand is done: ``agreed_s`` until ranks had agreed on it, then ``pass_s``."""
        self._passes_P2[self._passes] = pass_s, agreed_s
        self._passes += 1

    def gather(self) -> None:
        """All ranks at once, between passes: rank 0 hears what all have taken down."""
        passes = self._passes
        if not passes:
            return
        told_P = [self._layers_PLF[:passes].reshape(passes, -1), self._passes_P2[:passes]]
        told = torch.from_numpy(np.concatenate(told_P, axis=1)).to(self._group.device)
        heard_RPN = self._group.all_gather(told).cpu().numpy()
        self._passes = 0
        self._layers_PLF[:passes] = 0
        if self._group.is_first:
            layer = _by_name(heard_RPN, self._layers_PLF.shape[1])
            self._parts.append(figures_of(layer, heard_RPN[:, :, -2], heard_RPN[:, :, -1]))
            if self.balances_steps:
                self._steps.append(step_figures_of(layer, heard_RPN[:, :, -2]))


def _by_name(heard_RPN: npt.NDArray[np.float64], num_layers: int) -> dict[str, npt.NDArray[np.float64]]:
    layers_RPLF = heard_RPN[:, :, :-2].reshape(*heard_RPN.shape[:2], num_layers, len(NAMES))
    return {name: layers_RPLF[..., place] for place, name in enumerate(NAMES)}
