"""Which experts stay in memory: those whose next use is nearest. Pure functions of numbers.

A pass visits the layers in a circle. An expert of the layer that is d layers ahead, used in a pass with probability p, is
next used in d + L (1 - p) / p layers on average. Evicting the largest such distance is Belady's rule on the expectation:
with large batches (p near 1) it evicts what was just used, which is right for a scan where LRU misses everything; with
one sequence it keeps what is used often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Key = tuple[int, int]
"""An expert: (position among the MoE layers, number)."""

MIN_PROBABILITY = 1e-3


def expected_distance_LE(layer: int, probability_LE: Floats) -> Floats:
    """Expected layers until each expert's next use, counted from just after ``layer``. Shape (layers, experts).

    ``probability_LE`` is the chance that a pass uses the expert at all (0-1). The layer at hand is a whole circle away.
    """
    num_layers = probability_LE.shape[0]
    ahead_L = (np.arange(num_layers) - layer - 1) % num_layers + 1
    probability = np.clip(probability_LE, MIN_PROBABILITY, 1.0)
    return np.asarray(ahead_L[:, None] + num_layers * (1.0 - probability) / probability, dtype=np.float64)


def distance_with_foresight_LE(
    distance_LE: Floats,
    layer: int,
    used: Sequence[int],
    following: int,
    foreseen_E: npt.NDArray[np.floating],
    probability_LE: Floats,
) -> Floats:
    """The same distances when more is known: ``layer`` uses the experts ``used`` and no other, and the layer ``following`` it
    uses each of its experts with the chances ``foreseen_E`` (0-1) in this pass and ``probability_LE`` in later ones."""
    num_layers = len(distance_LE)
    known_LE = distance_LE.copy()
    unused_E = np.ones(distance_LE.shape[1], dtype=bool)
    unused_E[list(used)] = False
    known_LE[layer, unused_E] += num_layers
    later_E = num_layers / np.clip(probability_LE[following], MIN_PROBABILITY, 1.0)
    known_LE[following] += later_E * (1.0 - foreseen_E) - (later_E - num_layers)
    return known_LE


def updated_probability_E(probability_E: Floats, used_E: npt.NDArray[np.bool_], weight: float) -> Floats:
    """Exponential average of whether each expert was used in a pass; ``weight`` (0-1) is that of the newest pass."""
    return np.asarray((1.0 - weight) * probability_E + weight * used_E, dtype=np.float64)
