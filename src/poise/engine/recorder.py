"""Records where tokens go, pass by pass, into a routing trace, and on demand into a correlation table.

The counts of all passes are kept in memory until the end: 4 bytes per layer, expert and pass, outside the budget (62 KB a pass
for 61 layers of 256 experts).
"""

from __future__ import annotations

import numpy as np

from poise.engine.routing import Ints
from poise.errors import TraceError
from poise.predict.correlation import CorrelationTable
from poise.spec.model_spec import ModelSpec
from poise.spec.trace import Counts, RoutingTrace


class Recorder:
    """A routing listener. A pass counts when it has reached its last MoE layer; an aborted one leaves nothing."""

    def __init__(self, spec: ModelSpec, *, table: CorrelationTable | None = None) -> None:
        self._spec = spec
        self._table = table
        self._num_experts = max(spec.experts_L)
        self._steps: list[Counts] = []
        self._tokens: list[int] = []
        self._chosen: list[Ints] = []

    @property
    def steps(self) -> int:
        """Whole passes so far."""
        return len(self._steps)

    def on_layer(self, layer: int, chosen_TK: Ints) -> None:
        """See ``engine.routing``."""
        if layer == 0:
            self._chosen.clear()
        assert len(self._chosen) == layer, f"layer {layer} after {len(self._chosen)} layers of the pass"
        self._chosen.append(chosen_TK)
        if layer + 1 < len(self._spec.moe_layers):
            return
        self._tokens.append(len(chosen_TK))
        self._steps.append(np.stack([self._counts_E(chosen, at) for at, chosen in enumerate(self._chosen)]))
        if self._table is not None:
            for at, chosen in enumerate(self._chosen):
                self._table.observe(at, chosen, self._chosen[at - 1] if at else None)
        self._chosen.clear()

    def trace(self, model: str) -> RoutingTrace:
        """What was recorded. Raises TraceError if there was no whole pass."""
        if not self._steps:
            raise TraceError("nothing was recorded: no pass over the layers was completed; give at least one prompt")
        return RoutingTrace(
            counts_NLE=np.stack(self._steps),
            model=model,
            top_k=self._spec.top_k,
            layers=self._spec.moe_layers,
            tokens_per_step=tuple(self._tokens),
        )

    def _counts_E(self, chosen_TK: Ints, layer: int) -> Counts:
        """A masked choice is one that the layer has no expert for."""
        here = chosen_TK[chosen_TK < self._spec.experts_L[layer]]
        return np.bincount(here, minlength=self._num_experts).astype(np.int32)
