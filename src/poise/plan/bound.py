"""What no placement can beat: the least time of a layer's slowest rank, from curves and loads alone.

The smallest T at which ``sum_r f_r^-1(T)`` holds the load. Valid for any monotone curves.
Letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from poise.plan.expert_loads import Floats
from poise.plan.rank_costs import RankCosts

STEPS = 40


def bound_s_L(load_LE: Floats, costs: RankCosts, *, slots_per_rank: int) -> Floats:
    """Seconds; shape (L,). A layer without load is bound by 0."""
    total_L = load_LE.sum(axis=1)
    heaviest = np.full((1, costs.num_ranks), total_L.max())
    high_L = np.full(len(load_LE), costs.seconds_LR(heaviest, np.ones_like(heaviest)).max())
    low_L = np.zeros(len(load_LE))
    for _ in range(STEPS):
        middle_L = (low_L + high_L) / 2
        holds_L = np.zeros(len(load_LE))
        for curve, speed in zip(costs.curve_R, costs.speed_R, strict=True):
            holds_L += costs.curves[curve].tokens_within(middle_L * speed)
        enough_L = holds_L >= total_L
        high_L, low_L = np.where(enough_L, middle_L, high_L), np.where(enough_L, low_L, middle_L)
    return np.where(total_L > 0, low_L, 0.0)
