"""Which MoE layers are looked at before a step: one in which replicas have not paid lately only now and then.

``plan.step_rest`` has whole passes rest; here single layers do, while others are worth their plans. Numbers in, yes or no out:
no clock, the same on all ranks, since all come to the same plans.
"""

from __future__ import annotations

PATIENCE = 4
"""Plans in a row that did not bring what they take, until a layer is looked at in every ``EVERY``-th pass only."""
EVERY = 4


class StepLooks:
    """Of all layers. ``begin`` before each pass, ``saw`` behind each layer that was planned."""

    def __init__(self, num_layers: int) -> None:
        self._idle_L = [0] * num_layers
        self._passes = self._tokens = 0

    def begin(self, tokens: int) -> None:
        """A pass over so many tokens, of all ranks; with half or twice as many, what was seen counts no more."""
        self._passes += 1
        if not self._tokens <= 2 * tokens <= 4 * self._tokens:
            self._tokens = tokens
            self.forget()

    def forget(self, layer: int | None = None) -> None:
        """What was seen of a layer, or of all."""
        for each in range(len(self._idle_L)) if layer is None else (layer,):
            self._idle_L[each] = 0

    def looks_at(self, layer: int) -> bool:
        """Whether the layer's tokens are to be predicted, and replicas planned, in the pass at hand."""
        return self._idle_L[layer] < PATIENCE or self._passes % EVERY == 0

    def saw(self, layer: int, *, pays: bool) -> None:
        """Behind a layer that was planned: whether true tokens are done sooner by more than that takes."""
        self._idle_L[layer] = 0 if pays else self._idle_L[layer] + 1
