"""Groups of experts to nodes: with group-limited routing a token visits few groups, so whole groups belong on one node.

Each node gets equally many groups, by tokens over what its ranks do in a second, then swaps while they help.
Letters: L layers, E experts, G groups, V nodes.
"""

from __future__ import annotations

import numpy as np

from poise.plan.expert_loads import Floats, Ints
from poise.plan.rank_costs import RankCosts


def nodes_of_experts(
    load_LE: Floats, costs: RankCosts, *, num_nodes: int, num_groups: int, slots_per_rank: int
) -> Ints:
    """The node of each expert, shape (L, E)."""
    num_layers, num_experts = load_LE.shape
    group_LG = load_LE.reshape(num_layers, num_groups, -1).sum(axis=2)
    rate_V = _rates_R(load_LE, costs, slots_per_rank).reshape(num_nodes, -1).sum(axis=1)
    node_LG = _improve(group_LG, _pack(group_LG, rate_V), rate_V)
    return np.repeat(node_LG, num_experts // num_groups, axis=1)


def _rates_R(load_LE: Floats, costs: RankCosts, slots_per_rank: int) -> Floats:
    """Tokens per second of each rank at an even share of the load; equal where there is no load."""
    share = np.full((1, costs.num_ranks), load_LE.sum() / len(load_LE) / costs.num_ranks)
    if not share.any():
        return np.ones(costs.num_ranks)
    return np.asarray((share / costs.seconds_LR(share, np.full_like(share, slots_per_rank)))[0])


def _pack(group_LG: Floats, rate_V: Floats) -> Ints:
    """Groups in descending load, each to the node with room that would then finish first."""
    num_layers, num_groups = group_LG.shape
    layers = np.arange(num_layers)
    node_LG = np.empty((num_layers, num_groups), dtype=np.int64)
    tokens_LV = np.zeros((num_layers, len(rate_V)))
    room_LV = np.full((num_layers, len(rate_V)), num_groups // len(rate_V))
    for group_L in np.argsort(-group_LG, axis=1, kind="stable").T:
        after_LV = (tokens_LV + group_LG[layers, group_L][:, None]) / rate_V
        node_L = np.argmin(np.where(room_LV > 0, after_LV, np.inf), axis=1)
        node_LG[layers, group_L] = node_L
        tokens_LV[layers, node_L] += group_LG[layers, group_L]
        room_LV[layers, node_L] -= 1
    return node_LG


def _improve(group_LG: Floats, node_LG: Ints, rate_V: Floats) -> Ints:
    """Swaps a group of the slowest node for one of another while that makes the slower of the two faster."""
    layers = np.arange(len(group_LG))
    num_groups = group_LG.shape[1]
    node_LG = node_LG.copy()
    for _ in range(num_groups):
        seconds_LV = (group_LG[:, :, None] * (node_LG[:, :, None] == np.arange(len(rate_V)))).sum(axis=1) / rate_V
        worst_L = np.argmax(seconds_LV, axis=1)
        seconds_LG = np.take_along_axis(seconds_LV, node_LG, axis=1)
        less_LGG = group_LG[:, :, None] - group_LG[:, None, :]
        here_LGG = seconds_LV[layers, worst_L][:, None, None] - less_LGG / rate_V[worst_L][:, None, None]
        there_LGG = seconds_LG[:, None, :] + less_LGG / rate_V[node_LG][:, None, :]
        from_worst_LG = node_LG == worst_L[:, None]
        allowed_LGG = from_worst_LG[:, :, None] & ~from_worst_LG[:, None, :]
        after_LGG = np.where(allowed_LGG, np.maximum(here_LGG, there_LGG), np.inf).reshape(len(layers), -1)
        best_L = np.argmin(after_LGG, axis=1)
        better_L = after_LGG[layers, best_L] < seconds_LV[layers, worst_L] * (1.0 - 1e-9)
        if not better_L.any():
            break
        rows, one, other = layers[better_L], best_L[better_L] // num_groups, best_L[better_L] % num_groups
        node_LG[rows, one], node_LG[rows, other] = node_LG[rows, other], node_LG[rows, one]
    return node_LG
