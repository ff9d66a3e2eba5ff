"""The balance planner for every layer of a running group: prepared costs and homes, rebuilt when either changes.

Numbers only; the same on all ranks. Letters: L layers, R ranks, E experts, S slots, N replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.plan.balance import BalancePlan, Balancer
from poise.plan.balance_assignment import Dispatch, dispatch_of, tokens_to
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable
from poise.plan.observed_costs import ObservedCost, rank_costs
from poise.plan.rank_costs import RankCosts

NO_REPLICAS = np.empty((0, 3), dtype=np.int64)
PAIR_OCTAVES = 4
"""Passes of up to 2 ** 4, 2 ** 8, ... pairs have cost tables of their own, as a table reaches over fourteen octaves."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Links:
    """``bytes_per_s_R``: of each rank's link, each way. ``token_bytes``: of a token that travels; ``expert_bytes``: of an
    expert."""

    bytes_per_s_R: Floats
    token_bytes: int
    expert_bytes: int


class StepPlanner:
    """``slot_to_expert_LS``: experts at home. Plans nothing until it knows ``costs``. ``most_work``: as the planner has it."""

    def __init__(
        self,
        slot_to_expert_LS: Ints,
        links: Links,
        *,
        num_experts: int,
        replica_slots: int,
        most_work: int,
        costs: RankCosts | None = None,
    ) -> None:
        self._links, self._num_experts = links, num_experts
        self._replica_slots, self._most_work = replica_slots, most_work
        self._rows_L = list(np.asarray(slot_to_expert_LS, dtype=np.int64))
        self._share_LER = [self._shares(row_S) for row_S in self._rows_L]
        self._costs = costs
        self._balancer_of: dict[tuple[int, int], Balancer] = {}
        """By layer and by about how many pairs there are, as a power of two."""
        self._table_of: dict[int, CostTable] = {}

    @property
    def knows_costs(self) -> bool:
        """Whether anything can be planned."""
        return self._costs is not None

    def set_costs(self, costs: RankCosts | None) -> None:
        """From now on."""
        self._costs = costs
        self._balancer_of.clear()
        self._table_of.clear()

    def set_homes(self, layer: int, slot_to_expert_S: Ints) -> None:
        """A layer's experts have moved."""
        self._rows_L[layer] = np.asarray(slot_to_expert_S, dtype=np.int64)
        self._share_LER[layer] = self._shares(self._rows_L[layer])
        for key in [key for key in self._balancer_of if key[0] == layer]:
            del self._balancer_of[key]

    def home_pairs(self, layer: int, counts_RE: Ints, rank: int) -> float:
        """What a rank would compute with its experts at home alone, evenly where an expert has several."""
        return float(counts_RE.sum(axis=0).astype(float) @ self._share_LER[layer][:, rank])

    def plan(
        self,
        layer: int,
        counts_RE: Ints,
        window_s_R: Floats,
        in_frac_R: Floats,
        out_frac_R: Floats,
        copy_s_R: Floats | None = None,
    ) -> BalancePlan | None:
        """Replicas for these counts, to come within these windows, each of which takes ``copy_s_R`` of its two ranks'
        processors (None: nothing); None while costs are not known."""
        balancer = self._balancer(layer, counts_RE)
        if balancer is None:
            return None
        return balancer.choose_replicas(
            counts_RE, window_s_R, in_frac_R=in_frac_R, out_frac_R=out_frac_R, copy_s_R=copy_s_R
        )

    def plan_exposed(
        self, layer: int, counts_RE: Ints, expert_s_R: Floats, in_frac_R: Floats, out_frac_R: Floats
    ) -> BalancePlan | None:
        """Replicas that pay although all wait for them, ``expert_s_R`` each; None where none do."""
        best, best_s = None, np.inf
        for most in range(1, self._replica_slots + 1):
            window_s_R = (most + 0.5) * self._links.expert_bytes / self._links.bytes_per_s_R
            plan = self.plan(layer, counts_RE, window_s_R, in_frac_R, out_frac_R)
            if plan is None or not plan.pays:
                return best
            moved_RR = plan.transfers_RR
            wait_s = float((np.maximum(moved_RR.sum(axis=0), moved_RR.sum(axis=1)) * expert_s_R).max())
            if plan.predicted_s + wait_s < min(best_s, plan.unbalanced_s):
                best, best_s = plan, plan.predicted_s + wait_s
        return best

    def dispatch(
        self, layer: int, counts_RE: Ints, came_N3: Ints, in_frac_R: Floats, out_frac_R: Floats, *, rank: int
    ) -> tuple[Dispatch, Ints, float] | None:
        """Where a rank's true tokens go, given the replicas that have come, how many (token, expert) pairs come to it from each
        rank, and how much sooner the slowest rank ends for it; None: to the homes, where no expert has another copy, or while
        costs are not known."""
        balancer = self._balancer(layer, counts_RE) if len(came_N3) or self.has_choice(layer) else None
        if balancer is None:
            return None
        narrow_RE = np.ascontiguousarray(counts_RE, dtype=np.int32)  # once, as all three need it
        plan = balancer.divide(narrow_RE, came_N3, in_frac_R=in_frac_R, out_frac_R=out_frac_R)
        gain_s = plan.unbalanced_s - plan.predicted_s
        return dispatch_of(plan.assignment, narrow_RE, rank), tokens_to(plan.assignment, narrow_RE, rank), gain_s

    def has_choice(self, layer: int) -> bool:
        """Whether tokens have a choice between homes."""
        return len(self._rows_L[layer]) > self._num_experts

    def rehearse(self) -> None:
        """Compiles all of it, which takes long the first time on a machine."""
        ranks = len(self._links.bytes_per_s_R)
        costs, self._costs = self._costs, rank_costs([ObservedCost(expert_s=1e-4, token_s=1e-6)] * ranks)
        counts_RE = np.tile(1 + np.arange(self._num_experts), (ranks, 1))
        even_R = np.ones(ranks)
        plan = self.plan(0, counts_RE, even_R, even_R, even_R)
        assert plan is not None, "costs are known"
        self.dispatch(0, counts_RE, plan.replica_N3, even_R, even_R, rank=0)
        dispatch_of(plan.assignment, counts_RE, 0)
        self.set_costs(costs)

    def _balancer(self, layer: int, counts_RE: Ints) -> Balancer | None:
        if self._costs is None:
            return None
        octave = PAIR_OCTAVES * -(-max(1, int(counts_RE.sum()) - 1).bit_length() // PAIR_OCTAVES)
        key = layer, octave
        if key not in self._balancer_of:
            self._balancer_of[key] = Balancer(
                self._costs,
                self._rows_L[layer],
                num_experts=self._num_experts,
                link_bytes_per_s_R=self._links.bytes_per_s_R,
                token_bytes=self._links.token_bytes,
                expert_bytes=self._links.expert_bytes,
                most_tokens=2**octave,
                replica_slots=self._replica_slots,
                most_work=self._most_work,
                table=self._table_of.get(octave),
            )
            self._table_of[octave] = self._balancer_of[key].table
        return self._balancer_of[key]

    def _shares(self, row_S: Ints) -> Floats:
        """Of each expert on each rank; a rank that has it twice has it once."""
        ranks = len(self._links.bytes_per_s_R)
        share_ER = np.zeros((self._num_experts, ranks))
        share_ER[row_S, np.arange(len(row_S)) // (len(row_S) // ranks)] = 1.0
        return np.asarray(share_ER / share_ER.sum(axis=1, keepdims=True))
