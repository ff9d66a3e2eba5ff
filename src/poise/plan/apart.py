"""Takes copies of an expert that share a rank apart: a second copy there is a slot that does nothing for the balance.

Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np

from poise.plan.changes import Change, after_copy, apply_change
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.improve import improve_layer
from poise.plan.layer_state import CostTable, Layer, Limits, active_of, placed_layer, rank_s


@compiled
def take_apart(
    load_LE: Floats, slot_LS: Ints, table: CostTable, limits: Limits, target_L: Floats, most_changes: int
) -> Ints:
    """Each layer with no more than ``limits.most_alike`` copies of an expert on a rank, where that can be had, then improved
    until its target or until nothing helps. Experts stay within the node where they are."""
    apart_LS = slot_LS.copy()
    per_node = limits.ranks_per_node * limits.slots_per_rank
    for index in range(len(load_LE)):
        node_E = np.zeros(load_LE.shape[1], dtype=np.int64)
        for slot, expert in enumerate(slot_LS[index]):
            node_E[expert] = slot // per_node
        layer = placed_layer(load_LE[index], node_E, slot_LS[index], table, limits)
        for slot in range(len(layer.slot_S)):
            if layer.holds_ER[layer.slot_S[slot], slot // limits.slots_per_rank] > limits.most_alike:
                change = _best_without(layer, table, limits, slot)
                if change.slot >= 0:
                    apply_change(layer, table, limits, change)
        improve_layer(layer, table, limits, target_L[index], most_changes)
        apart_LS[index] = layer.slot_S
    return apart_LS


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
