"""Packs layers by predicted time: how many copies of each expert, and where; then improves them by swaps.

Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np

from poise.plan.changes import improve_layer
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, append, empty_layer, rank_s

WORTH_FRAC = 1e-3
"""Other copies are tried where they promise more."""


@compiled
def choose_copies(load_E: Floats, node_E: Ints, num_slots: int, num_nodes: int, most: int, hot: bool) -> Ints:
    """Copies of each expert, at most ``most``; all nodes have equally many slots.

    ``hot``: slots to spare go to the expert with the heaviest copies, else to the lightest expert, where a further copy keeps
    the fewest slots active: 1 - exp(-w / c) of each of c copies.
    """
    copies_E = np.ones(len(load_E), dtype=np.int64)
    for node in range(num_nodes):
        experts = np.flatnonzero(node_E == node)
        for _ in range(num_slots // num_nodes - len(experts)):
            best, best_score = experts[0], -np.inf
            for expert in experts:
                if copies_E[expert] < most:
                    score = load_E[expert] / copies_E[expert] if hot else -load_E[expert]
                    if score > best_score:
                        best, best_score = expert, score
            copies_E[best] += 1
    return copies_E


@compiled
def _even_s(load_E: Floats, copies_E: Ints, table: CostTable) -> float:
    """Time of the first rank if it had an even share of tokens and active slots."""
    active = 0.0
    for expert, copies in enumerate(copies_E):
        active += copies * active_of(load_E[expert] / copies)
    return rank_s(table, 0, load_E.sum() / len(table.curve_R), active / len(table.curve_R))


@compiled
def pack_layer(layer: Layer, table: CostTable, limits: Limits) -> None:
    """Places an empty layer: copies in descending weight, each on the rank of its node that would then finish first."""
    for expert in np.argsort(-layer.load_E / layer.copies_E, kind="mergesort"):
        tokens = layer.load_E[expert] / layer.copies_E[expert]
        active = active_of(tokens)
        first = layer.node_E[expert] * limits.ranks_per_node
        for _ in range(layer.copies_E[expert]):
            best, best_s = -1, np.inf
            for rank in range(first, first + limits.ranks_per_node):
                if layer.seconds_R[rank] >= best_s or layer.filled_R[rank] == limits.slots_per_rank:
                    continue
                if layer.holds_ER[expert, rank] < limits.most_alike:
                    after = rank_s(table, rank, layer.tokens_R[rank] + tokens, layer.active_R[rank] + active)
                    if after < best_s:
                        best, best_s = rank, after
            if best < 0:
                best = _make_room(layer, table, limits, expert, first)
            append(layer, table, limits, best, expert)


@compiled
def _make_room(layer: Layer, table: CostTable, limits: Limits, expert: int, first: int) -> int:
    """Every rank with a free slot has the expert already: moves another expert there from a rank that has not."""
    free = first
    while layer.filled_R[free] == limits.slots_per_rank:
        free += 1
    for rank in range(first, first + limits.ranks_per_node):
        if layer.holds_ER[expert, rank] < limits.most_alike and layer.filled_R[rank] > 0:
            base = rank * limits.slots_per_rank
            for slot in range(base + layer.filled_R[rank] - 1, base - 1, -1):
                moved = layer.slot_S[slot]
                if layer.holds_ER[moved, free] < limits.most_alike:
                    tokens = layer.load_E[moved] / layer.copies_E[moved]
                    layer.filled_R[rank] -= 1
                    layer.slot_S[slot] = layer.slot_S[base + layer.filled_R[rank]]
                    layer.holds_ER[moved, rank] -= 1
                    layer.tokens_R[rank] -= tokens
                    layer.active_R[rank] -= active_of(tokens)
                    append(layer, table, limits, free, moved)
                    return rank
    return free  # unavoidable: the slots of the node cannot keep the copies apart


@compiled
def place_layers(
    load_LE: Floats, node_LE: Ints, table: CostTable, limits: Limits, target_L: Floats, most_changes: int
) -> Ints:
    """slot_to_expert_LS: each layer packed with copies of hot experts and improved until its target, or until nothing helps.

    Where copies of the lightest experts would cost less (time follows active experts), these are tried as well.
    """
    num_layers, num_ranks = len(load_LE), len(table.curve_R)
    num_slots, num_nodes = num_ranks * limits.slots_per_rank, num_ranks // limits.ranks_per_node
    most = limits.most_alike * limits.ranks_per_node
    chosen_LS = np.zeros((num_layers, num_slots), dtype=np.int64)
    for index in range(num_layers):
        load_E, node_E = load_LE[index], node_LE[index]
        hot_E = choose_copies(load_E, node_E, num_slots, num_nodes, most, True)
        layer = _packed(load_E, node_E, hot_E, table, limits, target_L[index], most_changes)
        if layer.seconds_R.max() > target_L[index]:
            light_E = choose_copies(load_E, node_E, num_slots, num_nodes, most, False)
            if _even_s(load_E, light_E, table) < (1.0 - WORTH_FRAC) * _even_s(load_E, hot_E, table):
                other = _packed(load_E, node_E, light_E, table, limits, target_L[index], most_changes)
                if other.seconds_R.max() < layer.seconds_R.max():
                    layer = other
        chosen_LS[index] = layer.slot_S
    return chosen_LS


@compiled
def _packed(
    load_E: Floats,
    node_E: Ints,
    copies_E: Ints,
    table: CostTable,
    limits: Limits,
    target_s: float,
    most_changes: int,
) -> Layer:
    num_ranks = len(table.curve_R)
    layer = empty_layer(load_E, node_E, copies_E, num_ranks, num_ranks * limits.slots_per_rank)
    pack_layer(layer, table, limits)
    improve_layer(layer, table, limits, target_s, most_changes)
    return layer
