"""ViBE's planner: which device holds which experts, so that all devices finish a layer together.

``place_experts`` is for people with a machine file, ``place_on`` takes the costs of ranks directly. Pure and deterministic:
arrays in, a frozen plan out. Tokens of an expert are split evenly over its copies, as vLLM and SGLang (dynamic dispatch) do.
Letters: L layers, E experts, S slots of all ranks, R ranks. Rank r owns the slots r * S / R to (r + 1) * S / R - 1.
Source: ViBE (arXiv 2606.00735), the placement of section 3; replication as in DeepSeek's EPLB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.plan.anew import place_anew, predict_s_LR, table_for
from poise.plan.bound import bound_s_L
from poise.plan.moves import Moves, keep_slots, moves_between
from poise.plan.placement_request import LEAST_GAIN_FRAC, PlacementRequest, bytes_of
from poise.plan.rank_costs import Floats, Ints, RankCosts, only_expert_shape
from poise.plan.repair import CLOSE_FRAC, TABLE_FRAC, moves_to, repair
from poise.spec.curve import Shape
from poise.spec.machine import Machine

ANEW_MOVES_FRAC = 0.5
"""A new placement is taken to move at least this share of a layer's slots (it moves 80 to 96 %): none is made in vain."""

__all__ = ["PlacementPlan", "place_experts", "place_on", "predict_s_LR"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementPlan:
    """``slot_to_expert_LS``: the expert in each slot. Times are of one step, in seconds.

    ``predicted_s_LR``: of each rank; ``predicted_s_L``: of the slowest. ``bound_s_L``: no placement in these slots is faster.
    ``current_s_LR``: of the current placement under the same load, None without one. ``moves``: from the current placement
    to this one; None without one.
    """

    slot_to_expert_LS: Ints
    predicted_s_LR: Floats
    bound_s_L: Floats
    current_s_LR: Floats | None
    moves: Moves | None

    @property
    def predicted_s_L(self) -> Floats:
        """Time of each layer's experts: that of its slowest rank."""
        return np.asarray(self.predicted_s_LR.max(axis=1))

    @property
    def current_s_L(self) -> Floats | None:
        """Time of each layer's experts as they lie now."""
        return None if self.current_s_LR is None else np.asarray(self.current_s_LR.max(axis=1))

    @property
    def num_ranks(self) -> int:
        return int(self.predicted_s_LR.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return int(self.slot_to_expert_LS.shape[1]) // self.num_ranks


def place_experts(
    load_LE: npt.ArrayLike,
    machine: Machine,
    *,
    slots_per_rank: int,
    ranks: int | None = None,
    shape: Shape | None = None,
    steps: float = 1,
    current: npt.ArrayLike | None = None,
    max_moves: int | None = None,
    least_gain_frac: float = LEAST_GAIN_FRAC,
    ranks_per_node: int | None = None,
    expert_groups: int | None = None,
    expert_bytes: int | None = None,
) -> PlacementPlan:
    """A place for every expert of every layer.

    ``load_LE``: token-expert assignments that each expert got, summed over ``steps`` steps (passes of the model over all
    ranks' tokens); curves need the load of ONE step, so the number matters wherever they are not straight lines.
    ``ranks``: one on each device of ``machine``, in order, which is repeated if it has fewer; None: one per device.
    ``shape``: of the experts; None: the only one that the machine has curves for.
    ``current``: slot_to_expert_LS as it is now; then as few experts move as bring the plan within 1 % of a new one, and only
    where they save ``least_gain_frac`` of their layer's time for each move. With ``max_moves`` instead so many at most, in all
    layers together, where they gain most (0: none).
    ``ranks_per_node``: consecutive ranks with fast links between them. ``expert_groups``: with it, groups of consecutive
    experts are first given to nodes as wholes (group-limited routing); nodes must divide groups.
    ``expert_bytes``: of one expert's weights, for the moves; None: three matrices of ``shape``.
    Raises MachineError for a machine that does not fit, PlacementError for everything else.
    """
    costs = RankCosts.of_machine(machine, ranks=ranks, shape=shape)
    request = PlacementRequest(
        load_LE=np.asarray(load_LE, dtype=float),
        num_ranks=costs.num_ranks,
        slots_per_rank=slots_per_rank,
        steps=steps,
        current_LS=None if current is None else np.asarray(current),
        max_moves=max_moves,
        least_gain_frac=least_gain_frac,
        ranks_per_node=ranks_per_node,
        expert_groups=expert_groups,
    )
    nbytes = bytes_of(only_expert_shape(machine) if shape is None else shape) if expert_bytes is None else expert_bytes
    return place_on(request, costs, expert_bytes=nbytes)


def place_on(request: PlacementRequest, costs: RankCosts, *, expert_bytes: int) -> PlacementPlan:
    """The plan for a request on ranks of these costs. See ``place_experts``."""
    load_LE, current_LS = request.step_load_LE, request.current
    bound = bound_s_L(load_LE, costs, slots_per_rank=request.slots_per_rank)
    if current_LS is None:
        chosen_LS = place_anew(request, load_LE, costs, bound)
        return PlacementPlan(
            slot_to_expert_LS=chosen_LS,
            predicted_s_LR=predict_s_LR(load_LE, chosen_LS, costs),
            bound_s_L=bound,
            current_s_LR=None,
            moves=None,
        )
    current_LR = predict_s_LR(load_LE, current_LS, costs)
    chosen_LS = _few_moves(request, load_LE, costs, current_LS, bound)
    predicted_LR = predict_s_LR(load_LE, chosen_LS, costs)
    worse_L = predicted_LR.max(axis=1) > current_LR.max(axis=1)
    chosen_LS[worse_L], predicted_LR[worse_L] = current_LS[worse_L], current_LR[worse_L]
    moves = moves_between(
        current_LS,
        chosen_LS,
        num_ranks=request.num_ranks,
        ranks_per_node=request.node_ranks,
        expert_bytes=expert_bytes,
    )
    return PlacementPlan(
        slot_to_expert_LS=chosen_LS, predicted_s_LR=predicted_LR, bound_s_L=bound, current_s_LR=current_LR, moves=moves
    )


def _few_moves(request: PlacementRequest, load_LE: Floats, costs: RankCosts, current_LS: Ints, bound_L: Floats) -> Ints:
    """The current placement with the changes that are worth their moves. A layer that would then be far from a new placement
    takes that one where it is worth its own, if moves are not limited."""
    nodes_LE, kept_L = request.current_nodes()
    least_gain_frac = request.least_gain_frac if request.max_moves is None else 0.0
    goal_L = bound_L * (1.0 + CLOSE_FRAC - TABLE_FRAC)
    repaired = repair(
        load_LE,
        nodes_LE,
        current_LS,
        table_for(load_LE, costs, request),
        request.limits,
        goal_s_L=goal_L,
        least_gain_frac=least_gain_frac,
    )
    least_new_L = bound_L + repaired.price_L * (request.num_slots * ANEW_MOVES_FRAC)
    open_L = np.flatnonzero(((repaired.seconds_L > goal_L) & (repaired.cost_L > least_new_L)) | ~kept_L)
    new_LS = place_anew(request, load_LE, costs, bound_L, open_L)
    new_s_L = predict_s_LR(load_LE[open_L], new_LS, costs).max(axis=1)
    goal_L[open_L] = np.maximum(goal_L[open_L], new_s_L * (1.0 + CLOSE_FRAC - TABLE_FRAC))
    repaired = repaired.until(goal_L)
    if request.max_moves is not None:
        return keep_slots(current_LS, repaired.within(request.max_moves).slot_to_expert_LS, request.num_ranks)
    chosen_LS = repaired.slot_to_expert_LS
    price_L = repaired.price_L[open_L]
    new_moves_L = moves_to(current_LS[open_L], new_LS, request.num_ranks, request.num_experts)
    worth_L = new_s_L + price_L * new_moves_L < repaired.cost_L[open_L]
    is_close_L = (price_L == 0) & (repaired.seconds_L[open_L] <= goal_L[open_L])
    anew_L = ~kept_L[open_L] | (worth_L & ~is_close_L)
    chosen_LS[open_L[anew_L]] = new_LS[anew_L]
    return keep_slots(current_LS, chosen_LS, request.num_ranks)
