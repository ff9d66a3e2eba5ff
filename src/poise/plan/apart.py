"""Takes copies of an expert that share a rank apart, where the layer gets no slower: a second copy there is a slot that does
nothing for the balance.

For ranks that are alike. Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import math

import numpy as np

from poise.plan.annealing import anneal
from poise.plan.changes import Change, after_copy, apply_change
from poise.plan.compiled import compiled
from poise.plan.exhaustive import fastest_apart
from poise.plan.expert_loads import Floats, Ints
from poise.plan.improve import improve_layer
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, placed_layer, rank_s

NEAR_FRAC = 5e-4
"""Times that the table has within this of each other are left to the curves to compare."""
NODE_STEPS = 200_000
"""Of going through the placements of a node: 30 ms. Enough for 8 experts with 8 copies to spare."""
LAYERS_STEPS = 4_000_000
"""Of the thorough searches of all layers: two seconds. Layers after that do without."""


@compiled
def take_apart(
    load_LE: Floats, slot_LS: Ints, table: CostTable, limits: Limits, most_changes: int
) -> tuple[Ints, Floats]:
    """(slot_to_expert_LS with no more than ``limits.most_alike`` copies of an expert on a rank, improved until each layer is as
    fast as it was, or until nothing helps; seconds of each layer before). Experts stay within the node where they are."""
    apart_LS, before_L = slot_LS.copy(), np.zeros(len(load_LE))
    for index in range(len(load_LE)):
        layer = _taken_apart(load_LE[index], slot_LS[index], table, limits)
        before_L[index] = placed_layer(load_LE[index], layer.node_E, slot_LS[index], table, limits).seconds_R.max()
        improve_layer(layer, table, limits, before_L[index], most_changes, 0.0)
        apart_LS[index] = layer.slot_S
    return apart_LS, before_L


def search_apart(
    load_LE: Floats, apart_LS: Ints, table: CostTable, limits: Limits, target_L: Floats, layers: Ints
) -> None:
    """Replaces those ``layers`` of ``apart_LS`` for which a thorough search finds a placement within their target, or so close
    that the table cannot tell: of all placements where nodes are small, by annealing where they are not or steps run out.

    Its loops are compiled when first needed, which is seldom.
    """
    node_slots, steps = limits.ranks_per_node * limits.slots_per_rank, LAYERS_STEPS
    num_nodes = apart_LS.shape[1] // node_slots
    experts = load_LE.shape[1] // num_nodes
    is_small = math.comb(node_slots - 1, experts - 1) * experts <= NODE_STEPS
    for index in layers.tolist():
        if steps <= 0:
            break
        is_done = False
        if is_small:
            is_done, taken = _go_through(load_LE[index], apart_LS[index], table, limits, target_L[index])
            steps -= taken
        if not is_done:
            node_E = _nodes(load_LE[index], apart_LS[index], limits)
            found_S, _, taken = anneal(load_LE[index], node_E, apart_LS[index], table, limits, target_L[index])
            apart_LS[index], steps = found_S, steps - taken


def _go_through(load_E: Floats, slot_S: Ints, table: CostTable, limits: Limits, target_s: float) -> tuple[bool, int]:
    """Gives each node its fastest placement, if it has one near the target. (Whether all were seen; steps taken.)"""
    is_done, steps, limit_s = True, 0, target_s * (1.0 + NEAR_FRAC)
    for node_S in slot_S.reshape(-1, limits.ranks_per_node * limits.slots_per_rank):
        experts = np.unique(node_S)
        fastest = fastest_apart(load_E[experts], table, limits, limit_s, NODE_STEPS)
        is_done &= fastest.steps > 0
        steps += NODE_STEPS - fastest.steps
        if fastest.slot_S[0] >= 0:
            node_S[:] = experts[fastest.slot_S]
    return is_done, steps


@compiled
def _nodes(load_E: Floats, slot_S: Ints, limits: Limits) -> Ints:
    """The node where each expert lies."""
    node_E = np.zeros(len(load_E), dtype=np.int64)
    for slot, expert in enumerate(slot_S):
        node_E[expert] = slot // (limits.ranks_per_node * limits.slots_per_rank)
    return node_E


@compiled
def _taken_apart(load_E: Floats, slot_S: Ints, table: CostTable, limits: Limits) -> Layer:
    """The layer with its copies apart."""
    layer = placed_layer(load_E, _nodes(load_E, slot_S, limits), slot_S, table, limits)
    for slot in range(len(slot_S)):
        if layer.holds_ER[layer.slot_S[slot], slot // limits.slots_per_rank] > limits.most_alike:
            change = _best_without(layer, table, limits, slot)
            if change.slot >= 0:
                apply_change(layer, table, limits, change)
    return layer


@compiled
def _best_without(layer: Layer, table: CostTable, limits: Limits, slot: int) -> Change:
    """The change that takes the slot's expert out of it and leaves the ranks that get more to do fastest."""
    rank, old = slot // limits.slots_per_rank, layer.slot_S[slot]
    best = Change(-1, -1, -1, -1, np.inf)
    for new in range(len(layer.load_E)):
        if layer.node_E[new] == layer.node_E[old] and layer.holds_ER[new, rank] < limits.most_alike:
            after = layer.load_E[new] / (layer.copies_E[new] + 1)
            worst_s = after_copy(layer, table, limits, slot, new, after, active_of(after), best.worst_s)
            if worst_s < best.worst_s:
                best = Change(slot, new, -1, -1, worst_s)
    first = rank // limits.ranks_per_node * limits.ranks_per_node
    for other_slot in range(first * limits.slots_per_rank, (first + limits.ranks_per_node) * limits.slots_per_rank):
        there, other = other_slot // limits.slots_per_rank, layer.slot_S[other_slot]
        if layer.holds_ER[old, there] >= limits.most_alike or layer.holds_ER[other, rank] >= limits.most_alike:
            continue
        less, fewer = layer.each_E[old] - layer.each_E[other], layer.share_E[old] - layer.share_E[other]
        here_s = rank_s(table, rank, layer.tokens_R[rank] - less, layer.active_R[rank] - fewer)
        there_s = rank_s(table, there, layer.tokens_R[there] + less, layer.active_R[there] + fewer)
        if max(here_s, there_s) < best.worst_s:
            best = Change(slot, other, other_slot, old, max(here_s, there_s))
    return best
