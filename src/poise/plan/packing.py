"""Packs layers by predicted time: how many copies of each expert, and where; then improves them by swaps.

Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np

from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.improve import improve_layer
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, append, empty_layer, rank_s

EVEN_FRAC = 5e-4
"""Ranks that finish within this of each other are even enough."""
WORTH_FRAC = 3e-3
"""A layer this close to its target is not packed anew."""
HEAVIEST_FRACS = (1e9, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Heaviest copies that are tried, over an even share of the tokens; the first: no expert gets copies for its weight."""
MOST_STARTS = 2
"""Of these packings so many, the most promising, are improved."""
FEW_SLOTS = 64
"""Where there are no more, all are."""
PACKED_WEIGHT = 0.2
"""What a packing is slower than its even share counts little: improving takes most of it away."""


@compiled
def copies_of_hot(load_E: Floats, node_E: Ints, num_slots: int, num_nodes: int, most: int) -> Ints:
    """Copies of each expert, at most ``most``; all nodes have equally many slots. Slots to spare go to the expert with the
    heaviest copies, again and again."""
    copies_E = np.ones(len(load_E), dtype=np.int64)
    each_E = load_E.copy()
    for node in range(num_nodes):
        experts = np.flatnonzero(node_E == node)
        for _ in range(num_slots // num_nodes - len(experts)):
            best = experts[np.argmax(each_E[experts])]
            copies_E[best] += 1
            each_E[best] = load_E[best] / copies_E[best] if copies_E[best] < most else -1.0
    return copies_E


@compiled
def copies_of_light(
    load_E: Floats, node_E: Ints, num_slots: int, num_nodes: int, most: int, heaviest: float
) -> tuple[Ints, bool]:
    """(copies of each expert, whether there are slots for them): as few as keep each copy within ``heaviest`` tokens.

    All others are of the lightest experts: there further copies weigh least, and keep the fewest slots active,
    1 - exp(-w / c) of each of c copies.
    """
    copies_E = np.minimum(np.maximum(np.ceil(load_E / heaviest), 1.0), most).astype(np.int64)
    order_E = np.argsort(load_E, kind="mergesort")
    for node in range(num_nodes):
        left = num_slots // num_nodes - copies_E[node_E == node].sum()
        if left < 0:
            return copies_E, False
        for expert in order_E:
            if node_E[expert] == node:
                further = min(left, most - copies_E[expert])
                copies_E[expert] += further
                left -= further
    return copies_E, True


@compiled
def pack_layer(layer: Layer, table: CostTable, limits: Limits) -> None:
    """Places an empty layer: copies in descending weight, each on the rank of its node that would then finish first."""
    for expert in np.argsort(-layer.load_E / layer.copies_E, kind="mergesort"):
        tokens, active = layer.each_E[expert], layer.share_E[expert]
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
                    layer.filled_R[rank] -= 1
                    layer.slot_S[slot] = layer.slot_S[base + layer.filled_R[rank]]
                    layer.holds_ER[moved, rank] -= 1
                    layer.tokens_R[rank] -= layer.each_E[moved]
                    layer.active_R[rank] -= layer.share_E[moved]
                    append(layer, table, limits, free, moved)
                    return rank
    return free  # unavoidable: the slots of the node cannot keep the copies apart


@compiled
def place_layers(
    load_LE: Floats, node_LE: Ints, table: CostTable, limits: Limits, target_L: Floats, most_changes: int
) -> Ints:
    """slot_to_expert_LS: each layer packed with copies of hot experts and improved until its target, or until nothing helps.

    A layer that does not reach it is packed with other copies as well: fewer of hot experts, more of the lightest.
    """
    num_layers, num_ranks = len(load_LE), len(table.curve_R)
    num_slots, num_nodes = num_ranks * limits.slots_per_rank, num_ranks // limits.ranks_per_node
    most = limits.most_alike * limits.ranks_per_node
    chosen_LS = np.zeros((num_layers, num_slots), dtype=np.int64)
    for index in range(num_layers):
        load_E, node_E = load_LE[index], node_LE[index]
        hot_E = copies_of_hot(load_E, node_E, num_slots, num_nodes, most)
        layer = _packed(load_E, node_E, hot_E.copy(), table, limits)
        improve_layer(layer, table, limits, target_L[index], most_changes, EVEN_FRAC)
        if layer.seconds_R.max() > target_L[index] * (1.0 + WORTH_FRAC):
            layer = _other_copies(layer, hot_E, table, limits, target_L[index], most_changes)
        chosen_LS[index] = layer.slot_S
    return chosen_LS


@compiled
def _other_copies(
    layer: Layer, known_E: Ints, table: CostTable, limits: Limits, target_s: float, most_changes: int
) -> Layer:
    num_slots, num_ranks = len(layer.slot_S), len(table.curve_R)
    most, num_nodes = limits.most_alike * limits.ranks_per_node, num_ranks // limits.ranks_per_node
    share = layer.load_E.sum() / num_ranks
    starts, seconds = [layer], [np.inf]
    for frac in HEAVIEST_FRACS:
        copies_E, has_room = copies_of_light(layer.load_E, layer.node_E, num_slots, num_nodes, most, frac * share)
        if not has_room:
            break
        if (copies_E == known_E).all():
            continue
        known_E = copies_E
        other = _packed(layer.load_E, layer.node_E, copies_E, table, limits)
        starts.append(other)
        even_s = _even_s(layer.load_E, copies_E, table)
        seconds.append(even_s + PACKED_WEIGHT * (other.seconds_R.max() - even_s))
    order = np.argsort(np.array(seconds), kind="mergesort")
    best = layer
    most_starts = len(order) if num_slots <= FEW_SLOTS else MOST_STARTS
    for index in order[: min(most_starts, len(order) - 1)]:
        if best.seconds_R.max() <= target_s:
            break
        other = starts[index]
        improve_layer(other, table, limits, target_s, most_changes, EVEN_FRAC)
        if other.seconds_R.max() < best.seconds_R.max():
            best = other
    return best


@compiled
def _even_s(load_E: Floats, copies_E: Ints, table: CostTable) -> float:
    """Time of the first rank if it had an even share of tokens and active slots."""
    active = 0.0
    for expert, copies in enumerate(copies_E):
        active += copies * active_of(load_E[expert] / copies)
    return rank_s(table, 0, load_E.sum() / len(table.curve_R), active / len(table.curve_R))


@compiled
def _packed(load_E: Floats, node_E: Ints, copies_E: Ints, table: CostTable, limits: Limits) -> Layer:
    num_ranks = len(table.curve_R)
    layer = empty_layer(load_E, node_E, copies_E, num_ranks, num_ranks * limits.slots_per_rank)
    pack_layer(layer, table, limits)
    return layer
