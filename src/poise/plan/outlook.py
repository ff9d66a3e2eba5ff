"""What the layers to come will use, as far as it is known now, and so how far off each expert's next use is.

Kept up to date as a pass goes on: what a layer has asked for, what is foreseen of the next, how often each expert was used in
passes before. Numbers only: no clock, no random state, no thread; the same events give the same outlook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.plan.residency import Key, distance_with_foresight_LE, expected_distance_LE, updated_probability_E

PROBABILITY_WEIGHT = 0.2
"""Weight of the newest pass in the running chance that an expert is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreseen:
    """Of a layer's experts: the chance (0-1) that the pass uses each, and how many tokens are expected to choose it."""

    chance_E: npt.NDArray[np.floating]
    tokens_E: npt.NDArray[np.floating]


class Outlook:
    """``layer`` is at hand and has asked for ``used``; ``foreseen``: what is known of the layer ``following``, once it is.

    ``probability_LE``: the running chance that a pass uses an expert; ``distance_LE``: expected layers until its next use.
    """

    def __init__(self, experts_L: Sequence[int]) -> None:
        """``experts_L``: how many experts each MoE layer has."""
        self.num_layers = len(experts_L)
        self.layer = self.num_layers - 1
        self.used: set[int] = set()
        self.foreseen: Foreseen | None = None
        self.has_foresight = False
        there_LE = np.arange(max(experts_L)) < np.asarray(experts_L)[:, None]
        self.probability_LE = np.where(there_LE, 0.5, 0.0)
        self.distance_LE = expected_distance_LE(self.layer, self.probability_LE)

    @property
    def following(self) -> int:
        """The layer after the one at hand; behind the last comes the first."""
        return (self.layer + 1) % self.num_layers

    def enter(self, layer: int) -> None:
        """The layer at hand is done: learns what it used, and counts distances from ``layer``."""
        if self.used:
            used_E = np.zeros(self.probability_LE.shape[1], dtype=bool)
            used_E[list(self.used)] = True
            row_E = self.probability_LE[self.layer]
            self.probability_LE[self.layer] = updated_probability_E(row_E, used_E, PROBABILITY_WEIGHT)
        # The layer at hand stays where distances count from until it has computed: its experts are the nearest.
        self.distance_LE = expected_distance_LE(self.layer, self.probability_LE)
        self.layer = layer
        self.forget()

    def foresee(self, layer: int, foreseen: Foreseen) -> bool:
        """What the pass uses of the layer after the one at hand; False where it comes too late.

        Until that layer asks, it replaces the running chance.
        """
        self.has_foresight = True
        if layer == self.layer or not self.used:
            return False
        assert layer == self.following, f"layer {layer} is foreseen at layer {self.layer}"
        self.foreseen = foreseen
        self.distance_LE = distance_with_foresight_LE(
            self.distance_LE, self.layer, sorted(self.used), layer, foreseen.chance_E, self.probability_LE
        )
        return True

    def has_computed(self, key: Key) -> None:
        """An expert of the layer at hand has computed: its next use is in another pass."""
        self.distance_LE[key] += self.num_layers

    def forget(self) -> None:
        """Nothing has been asked for, and nothing is foreseen."""
        self.used.clear()
        self.foreseen = None
