"""What a rank expects of its own tokens in the next MoE layer, as counts by expert: strategies behind one method.

The first MoE layer of a pass follows the last one of the pass before; nobody predicts it from hidden states.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from poise.model.lookahead import Lookahead

Counts = npt.NDArray[np.int64]


class Forecast(Protocol):
    """Of one rank. ``name``: for people, as in "predicted by ..."."""

    @property
    def name(self) -> str: ...

    def saw(self, layer: int, own_E: Counts) -> None:
        """The true counts of this rank's tokens at a layer. Layers come in order, pass after pass."""
        ...

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None) -> Counts:
        """Expected counts at ``layer``, given the hidden states at the layer before (``real_T``: False for padding; None: all
        are real)."""
        ...


class LastPass:
    """As it was in the pass before; nothing before that is known."""

    name = "the pass before"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._last_LE = np.zeros((num_layers, num_experts), dtype=np.int64)

    def saw(self, layer: int, own_E: Counts) -> None:
        self._last_LE[layer] = own_E

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None) -> Counts:
        return np.array(self._last_LE[layer])


class Ahead:
    """By the router of the layer to come, asked a layer early; what cannot be predicted is as in the pass before.

    ``online``: somebody has the lookahead learn meanwhile.
    """

    def __init__(self, lookahead: Lookahead, num_layers: int, num_experts: int, *, online: bool = False) -> None:
        self._lookahead = lookahead
        self._learns = ", learning online" if online else ""
        self._last = LastPass(num_layers, num_experts)
        self._num_layers, self._num_experts = num_layers, num_experts

    @property
    def name(self) -> str:
        if not self._lookahead.predicted_layers:
            return self._last.name
        layers = f"{len(self._lookahead.predicted_layers)} of {self._num_layers} layers"
        return f"{self._lookahead.name} ({layers}){self._learns}"

    def saw(self, layer: int, own_E: Counts) -> None:
        self._last.saw(layer, own_E)

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None) -> Counts:
        if not self._lookahead.predicts(layer):
            return self._last.counts_E(layer, hidden_TH, real_T)
        if not len(hidden_TH) or not (real_T is None or real_T.any()):
            return np.zeros(self._num_experts, dtype=np.int64)
        return self._lookahead.counts_E(layer, hidden_TH, real_T)


class Replayed:
    """What is known from an earlier run over the same tokens, pass by pass: an oracle, for measurements."""

    name = "an earlier run"

    def __init__(self, counts_PLE: npt.NDArray[np.integer]) -> None:
        self._counts_PLE = np.asarray(counts_PLE, dtype=np.int64)
        self._seen = 0

    def saw(self, layer: int, own_E: Counts) -> None:
        self._seen += 1

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None) -> Counts:
        """Of the layer that follows the last one seen."""
        passes, layers, experts = self._counts_PLE.shape
        assert layer == self._seen % layers, "layers come in order"
        if self._seen >= passes * layers:
            return np.zeros(experts, dtype=np.int64)
        return np.array(self._counts_PLE[self._seen // layers, layer])
