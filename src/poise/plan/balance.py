"""PROBE's planner: replicas of hot experts for one layer of one step, and which rank computes whose tokens.

A ``Balancer`` prepares a group's costs once and then plans in microseconds. Before the router has spoken (predicted counts,
free replica slots) it chooses replicas; behind it (true counts, the replicas that came) it only divides the tokens. Pure and
deterministic, so that every rank comes to the same plan.
Letters: R ranks, E experts, S slots of all ranks, N replicas.
Source: PROBE (arXiv 2602.00509), section 4; how it differs: docs/balance-planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from poise.errors import PlacementError
from poise.plan.balance_assignment import Assignment
from poise.plan.balance_call import Figures, balance, divide
from poise.plan.balance_state import Counts
from poise.plan.cost_table import cost_table
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable
from poise.plan.rank_costs import RankCosts

Strategy = Literal["quota", "greedy"]
STRATEGIES = ("quota", "greedy")
MOST_WORK = 400
"""Copies set for one plan before trials end: about 30 microseconds. More comes nearer to the optimum where ranks are few."""
LEAST_TOKENS, LEAST_ACTIVE = 1.0, 0.25
"""A copy computes no tokens, or so many, and as many as take as long as this share of one more active expert (decision 060)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A copy of an expert that comes from ``source`` to ``target`` for this step."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BalancePlan:
    """``replica_N3``: expert, source and target rank of each replica that is to come. ``predicted_s_R``: when each rank ends,
    with the processor time of the copies that it takes in and gives.

    ``unbalanced_s``: the slowest rank with each expert's tokens evenly on its copies at home. ``pays``: whether replicas would
    bring ``balance_call.WORTH_FRAC``; if not, none come.
    """

    replica_N3: Ints
    assignment: Assignment
    predicted_s_R: Floats
    unbalanced_s: float
    pays: bool

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The copies that come."""
        return tuple(Replica(expert=e, source=a, target=b) for e, a, b in self.replica_N3.tolist())

    @property
    def predicted_s(self) -> float:
        """When the slowest rank finishes."""
        return float(self.predicted_s_R.max())

    @property
    def transfers_RR(self) -> Ints:
        """How many experts go from rank (row) to rank (column)."""
        ranks = len(self.predicted_s_R)
        moved_RR = np.zeros((ranks, ranks), dtype=np.int64)
        np.add.at(moved_RR, (self.replica_N3[:, 1], self.replica_N3[:, 2]), 1)
        return moved_RR


class Balancer:
    """Plans steps of one expert-parallel group. ``planned`` and ``declined`` count its plans, and those that would not pay.

    ``slot_to_expert_S``: experts at home; rank r owns the slots r * S / R to (r + 1) * S / R - 1. ``link_bytes_per_s_R``: of
    each rank's link, each way. ``token_bytes``: of a token that travels, ``expert_bytes``: of one expert's weights.
    ``most_tokens``: about the most assignments on one rank, for the cost table. ``most_work``: see ``MOST_WORK``; the
    least of a copy: see ``LEAST_TOKENS``. ``table``: that of another ``Balancer`` with the same costs, tokens and numbers of
    slots, which need not be made again.
    Raises PlacementError.
    """

    def __init__(
        self,
        costs: RankCosts,
        slot_to_expert_S: npt.ArrayLike,
        *,
        num_experts: int,
        link_bytes_per_s_R: npt.ArrayLike,
        token_bytes: float,
        expert_bytes: float,
        most_tokens: float,
        replica_slots: int = 3,
        strategy: Strategy = "quota",
        most_work: int = MOST_WORK,
        least_tokens: float = LEAST_TOKENS,
        least_active: float = LEAST_ACTIVE,
        table: CostTable | None = None,
    ) -> None:
        slots_S = np.ascontiguousarray(slot_to_expert_S, dtype=np.int64)
        ranks = costs.num_ranks
        if slots_S.ndim != 1 or not len(slots_S) or len(slots_S) % ranks:
            raise PlacementError(f"{slots_S.shape} slots on {ranks} ranks; give a multiple, in one row")
        missing = np.setdiff1d(np.arange(num_experts), slots_S)
        if len(missing) or slots_S.max() >= num_experts or slots_S.min() < 0:
            raise PlacementError(
                f"slots must hold the experts 0 to {num_experts - 1}, each at least once; missing: {missing[:5].tolist()}"
            )
        if replica_slots < 0:
            raise PlacementError(f"{replica_slots} replica slots on a rank; give 0 or more")
        if strategy not in STRATEGIES:
            raise PlacementError(f"there is no strategy {strategy!r}; choose from: {', '.join(STRATEGIES)}")
        links_R = np.broadcast_to(np.asarray(link_bytes_per_s_R, dtype=float), ranks)
        if min(links_R.min(), token_bytes, expert_bytes) <= 0:
            raise PlacementError("rates of links and bytes of tokens and experts must be above 0")
        most_active = len(slots_S) // ranks + replica_slots
        self._table = table or cost_table(costs, max_tokens=most_tokens, max_active=most_active)
        self._group = (
            slots_S,
            self._table.seconds_BAN,
            self._table.curve_R,
            np.stack([self._table.slowness_R, 2.0 * token_bytes / links_R, expert_bytes / links_R]),
            self._table.first_octave,
            self._table.per_active,
            replica_slots,
            most_work,
            float(least_tokens),
            float(least_active),
        )
        self._shape = (ranks, num_experts)
        self._is_greedy = strategy == "greedy"
        self._all_R, self._none_R = np.ones(ranks), np.zeros(ranks)
        self.planned = self.declined = 0

    @property
    def table(self) -> CostTable:
        """The cost table."""
        return self._table

    def choose_replicas(
        self,
        counts_RE: npt.NDArray[np.integer],
        window_s_R: Floats,
        *,
        in_frac_R: Floats | None = None,
        out_frac_R: Floats | None = None,
        copy_s_R: Floats | None = None,
    ) -> BalancePlan:
        """Replicas for a step of which (predicted) ``counts_RE`` are known: assignments by the rank they are born on.

        ``window_s_R``: how long each rank's link is free for experts behind compute. ``in_frac_R``, ``out_frac_R``: tokens that
        travel over assignments that do; None: all. ``copy_s_R``: processor time that a replica takes from the experts of the
        rank that it comes to, and of the one that it comes from; None: none, as copy engines move them.
        """
        plan = _planned(
            balance(
                self._checked(counts_RE),
                *self._group,
                self._all_R if in_frac_R is None else in_frac_R,
                self._all_R if out_frac_R is None else out_frac_R,
                window_s_R,
                self._none_R if copy_s_R is None else copy_s_R,
                self._is_greedy,
            )
        )
        self.planned += 1
        self.declined += not plan.pays
        return plan

    def divide(
        self,
        counts_RE: npt.NDArray[np.integer],
        replica_N3: Ints,
        *,
        in_frac_R: Floats | None = None,
        out_frac_R: Floats | None = None,
    ) -> BalancePlan:
        """The assignment of true ``counts_RE`` to the copies that are there: homes and the replicas that came."""
        return _planned(
            divide(
                self._checked(counts_RE),
                *self._group,
                self._all_R if in_frac_R is None else in_frac_R,
                self._all_R if out_frac_R is None else out_frac_R,
                np.ascontiguousarray(replica_N3, dtype=np.int64),
            )
        )

    def _checked(self, counts_RE: npt.NDArray[np.integer]) -> Counts:
        assert counts_RE.shape == self._shape, f"counts of {counts_RE.shape} ranks and experts, not {self._shape}"
        return np.ascontiguousarray(counts_RE, dtype=np.int32)


def _planned(figures: Figures) -> BalancePlan:
    replica_N3, begin_E1, rank_N, tokens_N, seconds_R, unbalanced_s, pays = figures
    return BalancePlan(
        replica_N3=replica_N3,
        assignment=Assignment(begin_E1=begin_E1, rank_N=rank_N, tokens_N=tokens_N),
        predicted_s_R=seconds_R,
        unbalanced_s=unbalanced_s,
        pays=pays,
    )
