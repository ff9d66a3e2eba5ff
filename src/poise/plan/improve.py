"""Improves a placed layer, change by change, and repairs a layer that lies as it does by as few moves as pay.

Compiled loops; see ``layer_state``. Letters: L layers, E experts, S slots, R ranks, C changes.
"""

from __future__ import annotations

import numpy as np

from poise.plan.changes import Change, apply_change, best_copy, best_swap
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Layer, Limits, placed_layer

PATIENCE = 16
"""Changes of a repair that may gain too little for their moves before it is given up, or as many as there are ranks: one
change relieves one rank, and time falls when all slow ones are relieved."""


@compiled
def improve_layer(
    layer: Layer, table: CostTable, limits: Limits, target_s: float, most_changes: int, even_frac: float
) -> int:
    """Changes until the layer is at ``target_s``, or none helps (much), or there were ``most_changes``; returns how many.

    ``even_frac``: ranks that finish within this of each other are even enough, and several changes together that gain less are
    not worth it; at 0 it ends only where no change helps.
    Swaps first: they disturb two ranks only. A copy is replaced where no swap helps.
    """
    throughput = (1.0 / table.slowness_R).sum()
    patience, earlier_s = max(8, len(layer.seconds_R) // 2), np.inf
    for count in range(most_changes):
        worst_s = layer.seconds_R.max()
        if count % patience == 0:
            if worst_s > earlier_s * (1.0 - even_frac):
                return count
            earlier_s = worst_s
        even_s = 0.0
        for rank in range(len(layer.seconds_R)):
            even_s += layer.seconds_R[rank] / table.slowness_R[rank]
        even_s /= throughput
        if worst_s <= max(target_s, even_s * (1.0 + even_frac)):
            return count
        change = best_swap(layer, table, limits)
        if change.slot < 0:
            change = best_copy(layer, table, limits, worst_s)
        if change.slot < 0:
            return count
        apply_change(layer, table, limits, change)
    return most_changes


@compiled
def repair_layers(
    load_LE: Floats,
    node_LE: Ints,
    current_LS: Ints,
    table: CostTable,
    limits: Limits,
    target_L: Floats,
    least_gain_frac: float,
    most_changes: int,
) -> tuple[Ints, Floats]:
    """Changes, fewest moves first, that bring each layer from where it is to its target or as near as they do.

    A layer is given up where its last changes, taken together, have not saved ``least_gain_frac`` of its time at
    first for each move. Returns (slot, expert, other slot, other expert, moves) of each change, -1 for none and 0 moves where
    there is no change: shape (L, C, 5); the slowest rank's time before the changes and after each of them, infinite where
    there is none: (L, C + 1).
    """
    num_layers, patience = len(load_LE), max(PATIENCE, len(table.curve_R))
    changes_LC5 = np.full((num_layers, most_changes, 5), -1, dtype=np.int64)
    changes_LC5[:, :, 4] = 0
    seconds_LC = np.full((num_layers, most_changes + 1), np.inf)
    for index in range(num_layers):
        layer = placed_layer(load_LE[index], node_LE[index], current_LS[index], table, limits)
        worst_s = layer.seconds_R.max()
        seconds_LC[index, 0] = worst_s
        price_s, least, least_at, moves = least_gain_frac * worst_s, worst_s, 0, 0
        for count in range(most_changes):
            is_hopeless = target_L[index] + price_s * (moves + 1) >= least
            if worst_s <= target_L[index] or is_hopeless or count - least_at >= patience:
                break
            change = _best_for_its_moves(layer, table, limits, worst_s, target_L[index])
            if change.slot < 0:
                break
            apply_change(layer, table, limits, change)
            worst_s = layer.seconds_R.max()
            moved = 1 if change.other_slot < 0 else 2
            changes_LC5[index, count] = np.array(
                [change.slot, change.expert, change.other_slot, change.other_expert, moved]
            )
            seconds_LC[index, count + 1] = worst_s
            moves += moved
            if worst_s + price_s * moves < least:
                least, least_at = worst_s + price_s * moves, count + 1
    return changes_LC5, seconds_LC


@compiled
def _best_for_its_moves(layer: Layer, table: CostTable, limits: Limits, worst_s: float, target_s: float) -> Change:
    """A swap or a copy, whichever gains more for each move on the way to ``target_s``; slot -1 if neither gains."""
    swap = best_swap(layer, table, limits)
    swap_gain = (worst_s - max(swap.worst_s, target_s)) / 2 if swap.slot >= 0 else 0.0
    copy = best_copy(layer, table, limits, worst_s - swap_gain)
    return copy if copy.slot >= 0 else swap


@compiled
def affordable(moves_LC: Ints, seconds_LC: Floats, counts_L: Ints, max_moves: int) -> Ints:
    """How many of each layer's first ``counts_L`` changes to make: again and again the next ones of a layer that gain most
    for each move, ``max_moves`` in all layers together."""
    made_L = np.zeros_like(counts_L)
    left = max_moves
    while True:
        best_layer, best_made, best_cost, best_rate = -1, 0, 0, 0.0
        for layer in range(len(counts_L)):
            cost = 0
            for count in range(made_L[layer], counts_L[layer]):
                cost += moves_LC[layer, count]
                if cost > left:
                    break
                rate = (seconds_LC[layer, made_L[layer]] - seconds_LC[layer, count + 1]) / cost
                if rate > best_rate:
                    best_layer, best_made, best_cost, best_rate = layer, count + 1, cost, rate
        if best_layer < 0:
            return made_L
        made_L[best_layer] = best_made
        left -= best_cost
