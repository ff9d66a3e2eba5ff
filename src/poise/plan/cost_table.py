"""Ranks' cost curves as a table, which the planner's compiled loops read in a few nanoseconds.

For search only: what a plan predicts is computed from the curves themselves. Tokens are spaced by octaves, active experts
evenly; between nodes the table is linear, which is within 2e-4 of a closed form.
"""

from __future__ import annotations

import math

import numpy as np

from poise.plan.expert_loads import Floats
from poise.plan.layer_state import PER_OCTAVE, CostTable
from poise.plan.rank_costs import RankCosts

OCTAVES = 14
"""From the largest number of tokens down; below, time is as at the lowest node."""
MOST_ACTIVE_STEPS = 16
LEAST_ACTIVE = 1e-3


def cost_table(costs: RankCosts, *, max_tokens: float, max_active: int) -> CostTable:
    """For ranks with at most so many tokens and active experts."""
    last_octave = math.ceil(math.log2(max(max_tokens, 1.0)))
    nodes_N = _octave_nodes() * 2.0 ** (last_octave - OCTAVES)
    active_A = np.linspace(0.0, max_active, min(max_active, MOST_ACTIVE_STEPS) + 1)
    tokens_AN, active_AN = np.meshgrid(nodes_N, np.maximum(active_A, LEAST_ACTIVE))
    return CostTable(
        seconds_BAN=np.stack([curve.seconds(tokens_AN, active_AN) for curve in costs.curves]),
        first_octave=last_octave - OCTAVES,
        per_active=(len(active_A) - 1) / max_active,
        curve_R=costs.curve_R,
        slowness_R=1.0 / costs.speed_R,
    )


def _octave_nodes() -> Floats:
    within = 1.0 + np.arange(PER_OCTAVE) / PER_OCTAVE
    return np.append(np.concatenate([within * 2.0**octave for octave in range(OCTAVES)]), 2.0**OCTAVES)
