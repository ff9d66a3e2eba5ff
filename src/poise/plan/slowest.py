"""How long the slowest rank takes, on average over steps that differ: more than the slowest of the averages.

Ranks that are equally loaded on average are never so in one step: few tokens fall now here, now there, and times scatter.
What an even placement brings is less than averages say, the less the smaller steps are. Letters: L layers, R ranks, S slots,
G points of a grid.
"""

from __future__ import annotations

import numpy as np

from poise.plan.expert_loads import Floats, Ints, active_share, rank_loads, slot_tokens
from poise.plan.rank_costs import RankCosts

GRID = 48
FAR = 4.0
"""Standard deviations to which the distribution of the slowest is summed up."""
STEP_FRAC = 0.01
"""For slopes of cost curves."""


def expected_slowest_s_L(load_LE: Floats, slot_to_expert_LS: Ints, costs: RankCosts, scatter_R: Floats) -> Floats:
    """Mean time of each layer's slowest rank in a step whose mean load is ``load_LE``.

    Tokens come independently (Poisson), times scatter by the share ``scatter_R``, and ranks are independent of each other.
    """
    num_ranks = costs.num_ranks
    tokens_LR, active_LR = rank_loads(load_LE, slot_to_expert_LS, num_ranks)
    mean_LR = costs.seconds_LR(tokens_LR, active_LR)
    token_LR = (costs.seconds_LR(tokens_LR * (1 + STEP_FRAC), active_LR) - mean_LR) / np.maximum(
        tokens_LR * STEP_FRAC, 1e-300
    )
    expert_LR = np.maximum(
        0.0,
        (costs.seconds_LR(tokens_LR, active_LR * (1 + STEP_FRAC)) - mean_LR)
        / np.maximum(active_LR * STEP_FRAC, 1e-300),
    )
    tokens_LS = slot_tokens(load_LE, slot_to_expert_LS)
    idle_LS = 1.0 - active_share(tokens_LS)
    by_rank = (len(load_LE), num_ranks, -1)
    both_LR = (tokens_LS * idle_LS).reshape(by_rank).sum(axis=2)
    some_LR = (idle_LS * (1.0 - idle_LS)).reshape(by_rank).sum(axis=2)
    variance_LR = token_LR**2 * tokens_LR + expert_LR**2 * some_LR + 2.0 * token_LR * expert_LR * both_LR
    return mean_of_largest_L(mean_LR, np.sqrt(variance_LR + (scatter_R * mean_LR) ** 2))


def mean_of_largest_L(mean_LR: Floats, deviation_LR: Floats) -> Floats:
    """E[max] of independent normal values: the integral of 1 - product of their distributions."""
    low_L = (mean_LR - FAR * deviation_LR).max(axis=1)
    high_L = (mean_LR + FAR * deviation_LR).max(axis=1)
    width_L = np.maximum(high_L - low_L, 0.0)
    share_G = (np.arange(GRID) + 0.5) / GRID
    at_LG = low_L[:, None] + width_L[:, None] * share_G
    below_LG = np.ones_like(at_LG)
    for mean_L, deviation_L in zip(mean_LR.T, deviation_LR.T, strict=True):
        off_LG = (at_LG - mean_L[:, None]) / np.maximum(deviation_L, 1e-300)[:, None]
        below_LG *= _normal(np.clip(off_LG, -8.0, 8.0))
    return np.asarray(low_L + width_L * (1.0 - below_LG).mean(axis=1))


def _normal(x: Floats) -> Floats:
    """The normal distribution, within 5e-4."""
    return np.asarray(0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))))
