"""The token balancer that engines use: DeepSeek's EPLB, the baseline of the placement planner.

It knows neither the ranks' speeds nor the placement before, and copies of one expert may share a rank. All layers are worked
on at once. Letters: X rows (layers, or layers x nodes), N items, L layers, E experts, S slots.
Source: github.com/deepseek-ai/EPLB (its README holds the example that the tests check).
"""

from __future__ import annotations

import numpy as np

from poise.plan.expert_loads import Floats, Ints


def balance_tokens(load_LE: Floats, *, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1) -> Ints:
    """slot_to_expert_LS. Hierarchical if nodes divide groups: groups of experts go to nodes, copies stay within a node.

    ``num_ranks`` divides ``num_slots``, ``num_groups`` the experts, ``num_nodes`` the ranks.
    """
    num_layers, num_experts = load_LE.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    by_group = (num_layers, num_groups, num_experts // num_groups)
    node_LG, place_LG = pack_evenly(load_LE.reshape(by_group).sum(axis=2), num_nodes)
    order_LG = np.argsort(node_LG * num_groups + place_LG, axis=1)
    experts_LG = np.arange(num_experts).reshape(by_group[1:])
    expert_XN = experts_LG[order_LG].reshape(num_layers * num_nodes, -1)
    load_XN = np.take_along_axis(load_LE, expert_XN.reshape(num_layers, -1), axis=1).reshape(expert_XN.shape)

    item_XP, copies_XN = replicate(load_XN, num_slots // num_nodes)
    each_XP = np.take_along_axis(load_XN / copies_XN, item_XP, axis=1)
    ranks_per_node = num_ranks // num_nodes
    rank_XP, place_XP = pack_evenly(each_XP, ranks_per_node)
    slot_XP = rank_XP * (num_slots // num_ranks) + place_XP
    by_slot_XP = np.empty_like(item_XP)
    np.put_along_axis(by_slot_XP, slot_XP, np.take_along_axis(expert_XN, item_XP, axis=1), axis=1)
    return by_slot_XP.reshape(num_layers, num_slots)


def replicate(load_XN: Floats, num_copies: int) -> tuple[Ints, Ints]:
    """(item of each copy, copies of each item): every item once, then again and again that with the heaviest copies."""
    rows = np.arange(len(load_XN))
    num_items = load_XN.shape[1]
    item_XP = np.tile(np.arange(num_copies), (len(load_XN), 1))
    copies_XN = np.ones(load_XN.shape, dtype=np.int64)
    each_XN = load_XN.astype(float)
    for copy in range(num_items, num_copies):
        heaviest_X = np.argmax(each_XN, axis=1)
        item_XP[:, copy] = heaviest_X
        copies_XN[rows, heaviest_X] += 1
        each_XN[rows, heaviest_X] = load_XN[rows, heaviest_X] / copies_XN[rows, heaviest_X]
    return item_XP, copies_XN


def pack_evenly(load_XN: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """(pack of each item, its place there): items in descending load, each into the lightest pack that is not full."""
    num_rows, num_items = load_XN.shape
    most = num_items // num_packs
    if most == 1:
        return np.tile(np.arange(num_items), (num_rows, 1)), np.zeros(load_XN.shape, dtype=np.int64)
    rows = np.arange(num_rows)
    order_XN = np.argsort(-load_XN, axis=1, kind="stable")
    pack_XN, place_XN = np.empty((2, num_rows, num_items), dtype=np.int64)
    weight_XM = np.zeros((num_rows, num_packs))
    filled_XM = np.zeros((num_rows, num_packs), dtype=np.int64)
    for item_X in order_XN.T:
        pack_X = np.argmin(weight_XM, axis=1)
        place_X = filled_XM[rows, pack_X]
        pack_XN[rows, item_X], place_XN[rows, item_X] = pack_X, place_X
        filled_XM[rows, pack_X] = place_X + 1
        weight_XM[rows, pack_X] += np.where(place_X + 1 == most, np.inf, load_XN[rows, item_X])
    return pack_XN, place_XN
