"""Brings a placement close to the best one by few moves: after drift, or when devices' speeds change.

A move loads one expert's weights into a slot of another rank; a swap takes two. Source: ViBE, incremental recalibration.
Letters: L layers, E experts, S slots, C changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.plan.changes import repair_layers
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable, Limits

CLOSE_FRAC = 0.01
"""How far a repaired layer may be from a new placement: closer costs many more moves than it is worth."""
TABLE_FRAC = 5e-4
"""Left for the difference between the table, which the search reads, and the curves."""
MOST_CHANGES = 400


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repair:
    """``slot_to_expert_LS``: as good as the moves allow. ``close_L``: layers that came within ``CLOSE_FRAC`` of the goal."""

    slot_to_expert_LS: Ints
    close_L: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def repair(
    load_LE: Floats,
    node_LE: Ints,
    current_LS: Ints,
    table: CostTable,
    limits: Limits,
    *,
    goal_s_L: Floats,
    max_moves: int | None,
) -> Repair:
    """The current placement with changes, until every layer is close to ``goal_s_L`` (what a new placement takes).

    With ``max_moves`` the changes that gain most for each move are made, in whichever layers.
    """
    target_L = goal_s_L * (1.0 + CLOSE_FRAC - TABLE_FRAC)
    changes_LC5, seconds_LC, counts_L = repair_layers(
        load_LE, node_LE, current_LS, table, limits, target_L, MOST_CHANGES
    )
    if max_moves is not None:
        counts_L = _affordable(changes_LC5[:, :, 4], seconds_LC, counts_L, max_moves)
    repaired_LS = current_LS.copy()
    for layer, count in enumerate(counts_L):
        for slot, expert, other_slot, other_expert, _ in changes_LC5[layer, :count]:
            repaired_LS[layer, slot] = expert
            if other_slot >= 0:
                repaired_LS[layer, other_slot] = other_expert
    reached_L = np.take_along_axis(seconds_LC, counts_L[:, None], axis=1)[:, 0]
    return Repair(slot_to_expert_LS=repaired_LS, close_L=reached_L <= target_L)


def _affordable(moves_LC: Ints, seconds_LC: Floats, counts_L: Ints, max_moves: int) -> Ints:
    """How many of each layer's changes to make: again and again the next ones of a layer that gain most for each move."""
    made_L = np.zeros_like(counts_L)
    left = max_moves
    while True:
        best, best_rate = None, 0.0
        for layer, count in enumerate(counts_L):
            made = made_L[layer]
            cost_C = np.cumsum(moves_LC[layer, made:count])
            gain_C = seconds_LC[layer, made] - seconds_LC[layer, made + 1 : count + 1]
            rate_C = np.where(cost_C <= left, gain_C / np.maximum(cost_C, 1), 0.0)
            if len(rate_C) and rate_C.max() > best_rate:
                further = int(np.argmax(rate_C))
                best, best_rate = (layer, made + further + 1, int(cost_C[further])), float(rate_C[further])
        if best is None:
            return made_L
        layer, made_L[best[0]], cost = best
        left -= cost
