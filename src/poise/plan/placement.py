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

from poise.plan.bound import bound_s_L
from poise.plan.cost_table import cost_table
from poise.plan.eplb import balance_tokens
from poise.plan.expert_loads import rank_loads
from poise.plan.groups import nodes_of_experts
from poise.plan.layer_state import CostTable, Limits
from poise.plan.moves import Moves, keep_slots, moves_between
from poise.plan.packing import place_layers
from poise.plan.placement_request import PlacementRequest, bytes_of
from poise.plan.rank_costs import Floats, Ints, RankCosts, only_expert_shape
from poise.plan.repair import repair
from poise.spec.curve import Shape
from poise.spec.machine import Machine

ENOUGH_FRAC = 5e-4
"""A layer this close to the bound is not improved further."""
MOST_CHANGES = 200


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
    ranks_per_node: int | None = None,
    expert_groups: int | None = None,
    expert_bytes: int | None = None,
) -> PlacementPlan:
    """A place for every expert of every layer.

    ``load_LE``: token-expert assignments that each expert got, summed over ``steps`` steps (passes of the model over all
    ranks' tokens); curves need the load of ONE step, so the number matters wherever they are not straight lines.
    ``ranks``: one on each device of ``machine``, in order, which is repeated if it has fewer; None: one per device.
    ``shape``: of the experts; None: the only one that the machine has curves for.
    ``current``: slot_to_expert_LS as it is now; then as few experts move as bring the plan within 1 % of a new one, at most
    ``max_moves`` in all layers together (0: none).
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
        ranks_per_node=ranks_per_node,
        expert_groups=expert_groups,
    )
    nbytes = bytes_of(only_expert_shape(machine) if shape is None else shape) if expert_bytes is None else expert_bytes
    return place_on(request, costs, expert_bytes=nbytes)


def place_on(request: PlacementRequest, costs: RankCosts, *, expert_bytes: int) -> PlacementPlan:
    """The plan for a request on ranks of these costs. See ``place_experts``."""
    load_LE, current_LS = request.step_load_LE, request.current
    slots = request.slots_per_rank
    bound = bound_s_L(load_LE, costs, slots_per_rank=slots)
    table = cost_table(costs, max_tokens=float(load_LE.sum(axis=1).max()), max_active=slots)
    chosen_LS = _new_placement(request, load_LE, costs, table, bound)
    predicted_LR = predict_s_LR(load_LE, chosen_LS, costs)
    current_LR = None
    if current_LS is not None:
        current_LR = predict_s_LR(load_LE, current_LS, costs)
        chosen_LS = _few_moves(request, load_LE, table, chosen_LS, predicted_LR.max(axis=1))
        predicted_LR = predict_s_LR(load_LE, chosen_LS, costs)
        worse_L = predicted_LR.max(axis=1) > current_LR.max(axis=1)
        chosen_LS[worse_L], predicted_LR[worse_L] = current_LS[worse_L], current_LR[worse_L]
    return PlacementPlan(
        slot_to_expert_LS=chosen_LS,
        predicted_s_LR=predicted_LR,
        bound_s_L=bound,
        current_s_LR=current_LR,
        moves=None
        if current_LS is None
        else moves_between(
            current_LS,
            chosen_LS,
            num_ranks=request.num_ranks,
            ranks_per_node=request.node_ranks,
            expert_bytes=expert_bytes,
        ),
    )


def predict_s_LR(load_LE: Floats, slot_to_expert_LS: Ints, costs: RankCosts) -> Floats:
    """Time of each rank under a placement; ``load_LE`` is of one step. The one judge of every placement."""
    tokens_LR, active_LR = rank_loads(load_LE, slot_to_expert_LS, costs.num_ranks)
    return costs.seconds_LR(tokens_LR, active_LR)


def _new_placement(
    request: PlacementRequest, load_LE: Floats, costs: RankCosts, table: CostTable, bound_L: Floats
) -> Ints:
    """Without regard to the current one. Where all ranks are alike, never slower than the token balancer's."""
    node_LE = _nodes(request, load_LE, costs)
    chosen_LS = place_layers(load_LE, node_LE, table, _limits(request), bound_L * (1.0 + ENOUGH_FRAC), MOST_CHANGES)
    if costs.alike:
        balanced_LS = balance_tokens(
            load_LE,
            num_slots=request.num_slots,
            num_ranks=request.num_ranks,
            num_nodes=request.group_nodes,
            num_groups=request.expert_groups or 1,
        )
        chosen_L = predict_s_LR(load_LE, chosen_LS, costs).max(axis=1)
        better_L = predict_s_LR(load_LE, balanced_LS, costs).max(axis=1) < chosen_L
        chosen_LS[better_L] = balanced_LS[better_L]
    return chosen_LS


def _few_moves(request: PlacementRequest, load_LE: Floats, table: CostTable, new_LS: Ints, new_s_L: Floats) -> Ints:
    """The current placement, repaired. A layer whose repair ends far from the new placement takes that one, if moves are
    not limited."""
    current_LS = request.current
    assert current_LS is not None, "there is a placement to repair"
    nodes_LE, kept_L = request.current_nodes()
    repaired = repair(
        load_LE, nodes_LE, current_LS, table, _limits(request), goal_s_L=new_s_L, max_moves=request.max_moves
    )
    chosen_LS = repaired.slot_to_expert_LS
    if request.max_moves is None:
        anew_L = ~(repaired.close_L & kept_L)
        chosen_LS[anew_L] = new_LS[anew_L]
    return keep_slots(current_LS, chosen_LS, request.num_ranks)


def _limits(request: PlacementRequest) -> Limits:
    return Limits(
        slots_per_rank=request.slots_per_rank,
        ranks_per_node=request.num_ranks // request.group_nodes,
        most_alike=-(-request.slots_per_rank * request.group_nodes // request.num_experts),
    )


def _nodes(request: PlacementRequest, load_LE: Floats, costs: RankCosts) -> Ints:
    """The node that each expert must stay in; 0 for all where experts have no groups."""
    if request.expert_groups is None:
        return np.zeros(load_LE.shape, dtype=np.int64)
    return nodes_of_experts(
        load_LE,
        costs,
        num_nodes=request.group_nodes,
        num_groups=request.expert_groups,
        slots_per_rank=request.slots_per_rank,
    )
