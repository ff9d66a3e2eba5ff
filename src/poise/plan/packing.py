"""Packing by predicted time: experts in descending load, each to the rank with a free slot that would then finish first."""

from __future__ import annotations

import numpy as np

from poise.plan.expert_loads import Floats, Ints, active_share
from poise.plan.rank_costs import RankCosts


def copies_for(load_LE: Floats, num_slots: int) -> Ints:
    """Copies of each expert, shape (L, E), that make the heaviest copy as light as can be."""
    layers = np.arange(len(load_LE))
    copies_LE = np.ones(load_LE.shape, dtype=np.int64)
    for _ in range(num_slots - load_LE.shape[1]):
        copies_LE[layers, np.argmax(load_LE / copies_LE, axis=1)] += 1
    return copies_LE


def pack(load_LE: Floats, costs: RankCosts, *, slots_per_rank: int) -> Ints:
    """slot_to_expert_LS."""
    num_layers, num_ranks = len(load_LE), costs.num_ranks
    num_slots, layers = num_ranks * slots_per_rank, np.arange(num_layers)
    copies_LE = copies_for(load_LE, num_slots)
    experts_LS = np.stack([np.repeat(np.arange(load_LE.shape[1]), copies_E) for copies_E in copies_LE])
    each_LS = np.take_along_axis(load_LE / copies_LE, experts_LS, axis=1)
    order_LS = np.argsort(-each_LS, axis=1, kind="stable")
    experts_LS = np.take_along_axis(experts_LS, order_LS, axis=1)
    each_LS = np.take_along_axis(each_LS, order_LS, axis=1)
    tokens_LR, active_LR = np.zeros((2, num_layers, num_ranks))
    filled_LR = np.zeros((num_layers, num_ranks), dtype=np.int64)
    slots_LRK = np.full((num_layers, num_ranks, slots_per_rank), -1)
    for index in range(num_slots):
        expert_L, each_L1 = experts_LS[:, index], each_LS[:, index : index + 1]
        seconds_LR = costs.seconds_LR(tokens_LR + each_L1, active_LR + active_share(each_L1))
        there_LR = (slots_LRK == expert_L[:, None, None]).any(axis=2)
        key = (filled_LR >= slots_per_rank) * 2 + there_LR
        seconds_LR = np.where(key > 0, np.inf, seconds_LR) if (key == 0).any(axis=1).all() else seconds_LR + key * 1e9
        rank_L = np.argmin(seconds_LR, axis=1)
        slots_LRK[layers, rank_L, filled_LR[layers, rank_L]] = expert_L
        tokens_LR[layers, rank_L] += each_L1[:, 0]
        active_LR[layers, rank_L] += active_share(each_L1[:, 0])
        filled_LR[layers, rank_L] += 1
    return slots_LRK.reshape(num_layers, num_slots)
