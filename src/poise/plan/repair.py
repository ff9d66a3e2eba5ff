"""Brings a placement close to the best one by few moves: after drift, or when devices' speeds change.

A move loads one expert's weights into a slot of another rank; a swap takes two. A placement is worth its time and a price for
each move: a share of the layer's time now. Source: ViBE, incremental recalibration.
Letters: L layers, E experts, S slots, R ranks, C changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.plan.expert_loads import Floats, Ints
from poise.plan.improve import affordable, repair_layers
from poise.plan.layer_state import CostTable, Limits

CLOSE_FRAC = 0.01
"""How far a repaired layer may be from a new placement: closer costs many more moves than it is worth."""
TABLE_FRAC = 5e-4
"""Left for the difference between the table, which the search reads, and the curves."""
MOST_CHANGES = 400


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repair:
    """The ways from the current placement, change by change, and how many changes of each layer are to be made.

    See ``repair_layers`` for ``changes_LC5`` and ``seconds_LC``. ``price_L``: seconds that a move must save.
    """

    current_LS: Ints
    changes_LC5: Ints
    seconds_LC: Floats
    price_L: Floats
    counts_L: Ints

    @property
    def seconds_L(self) -> Floats:
        """Of the slowest rank, once the changes are made."""
        return np.asarray(np.take_along_axis(self.seconds_LC, self.counts_L[:, None], axis=1)[:, 0])

    @property
    def moves_L(self) -> Ints:
        return np.asarray(np.take_along_axis(_moves_until(self.changes_LC5), self.counts_L[:, None], axis=1)[:, 0])

    @property
    def cost_L(self) -> Floats:
        """Seconds, with the price of the moves."""
        return np.asarray(self.seconds_L + self.price_L * self.moves_L)

    @property
    def slot_to_expert_LS(self) -> Ints:
        """With the changes made."""
        repaired_LS = self.current_LS.copy()
        for layer in np.flatnonzero(self.counts_L):
            for slot, expert, other_slot, other_expert, _ in self.changes_LC5[layer, : self.counts_L[layer]].tolist():
                repaired_LS[layer, slot] = expert
                if other_slot >= 0:
                    repaired_LS[layer, other_slot] = other_expert
        return repaired_LS

    def until(self, goal_s_L: Floats) -> Repair:
        """With no more changes than bring each layer to its goal, or than are worth their moves."""
        cost_LC = self.seconds_LC + self.price_L[:, None] * _moves_until(self.changes_LC5)
        reached_LC = self.seconds_LC <= goal_s_L[:, None]
        last_L = np.where(reached_LC.any(axis=1), np.argmax(reached_LC, axis=1), self.seconds_LC.shape[1])
        cost_LC[np.arange(cost_LC.shape[1]) > last_L[:, None]] = np.inf
        cheapest_L = np.argmin(cost_LC, axis=1)
        free_L = (self.price_L == 0) & reached_LC.any(axis=1)
        return self._with(np.where(free_L, last_L, cheapest_L))

    def within(self, max_moves: int) -> Repair:
        """With so many moves at most, in all layers together, where they gain most for each."""
        return self._with(affordable(self.changes_LC5[:, :, 4], self.seconds_LC, self.counts_L, max_moves))

    def _with(self, counts_L: npt.NDArray[np.intp]) -> Repair:
        return Repair(
            current_LS=self.current_LS,
            changes_LC5=self.changes_LC5,
            seconds_LC=self.seconds_LC,
            price_L=self.price_L,
            counts_L=counts_L.astype(np.int64),
        )


def repair(
    load_LE: Floats,
    node_LE: Ints,
    current_LS: Ints,
    table: CostTable,
    limits: Limits,
    *,
    goal_s_L: Floats,
    least_gain_frac: float,
) -> Repair:
    """The current placement with changes, until every layer is at ``goal_s_L`` or further moves are not worth it."""
    changes_LC5, seconds_LC = repair_layers(
        load_LE, node_LE, current_LS, table, limits, goal_s_L, least_gain_frac, MOST_CHANGES
    )
    most = int(np.isfinite(seconds_LC).sum(axis=1).max())
    whole = Repair(
        current_LS=current_LS,
        changes_LC5=changes_LC5[:, : most - 1],
        seconds_LC=seconds_LC[:, :most],
        price_L=least_gain_frac * seconds_LC[:, 0],
        counts_L=np.zeros(len(load_LE), dtype=np.int64),
    )
    return whole.until(goal_s_L)


def moves_to(before_LS: Ints, after_LS: Ints, num_ranks: int, num_experts: int) -> Ints:
    """How many slots of each layer get an expert that their rank did not have; shape (L,)."""
    num_layers, num_slots = before_LS.shape
    layer_L1 = np.arange(num_layers)[:, None]
    rank_S = np.arange(num_slots) // (num_slots // num_ranks)
    holds_LRE = np.zeros((num_layers, num_ranks, num_experts), dtype=np.bool_)
    holds_LRE[layer_L1, rank_S, before_LS] = True
    return np.asarray(np.count_nonzero(~holds_LRE[layer_L1, rank_S, after_LS], axis=1))


def _moves_until(changes_LC5: Ints) -> Ints:
    """Moves before any change and after each; shape (L, C + 1)."""
    moves_LC = np.cumsum(changes_LC5[:, :, 4], axis=1)
    return np.concatenate([np.zeros((len(moves_LC), 1), dtype=np.int64), moves_LC], axis=1)
