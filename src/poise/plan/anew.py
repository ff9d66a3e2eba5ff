"""A placement without regard to the current one: the planner's own, or a token balancer's where that is better.

Letters: L layers, E experts, S slots, R ranks, O the layers asked for.
"""

from __future__ import annotations

import numpy as np

from poise.plan.apart import search_apart, take_apart
from poise.plan.cost_table import cost_table
from poise.plan.eplb import balance_tokens
from poise.plan.expert_loads import Floats, Ints, rank_loads
from poise.plan.groups import nodes_of_experts
from poise.plan.layer_state import CostTable, Limits
from poise.plan.packing import place_layers
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import RankCosts

ENOUGH_FRAC = 5e-4
"""A layer this close to the bound is not improved further."""
ROUNDING_FRAC = 1e-12
"""Times this close to each other are the same."""
MOST_CHANGES = 200


def place_anew(
    request: PlacementRequest,
    load_LE: Floats,
    costs: RankCosts,
    bound_L: Floats,
    layers_O: Ints | None = None,
) -> Ints:
    """slot_to_expert_OS, for all layers where ``layers_O`` is None. ``load_LE``: tokens in one step.

    Where all ranks are alike, no layer is slower than the token balancer's. Copies of an expert share a rank only where they do
    in the token balancer's and no placement without was found that is as fast.
    """
    node_LE, table = _nodes(request, load_LE, costs), table_for(load_LE, costs, request)
    if layers_O is not None:
        load_LE, node_LE, bound_L = load_LE[layers_O], node_LE[layers_O], bound_L[layers_O]
    target_L = bound_L * (1.0 + ENOUGH_FRAC)
    chosen_LS = place_layers(load_LE, node_LE, table, request.limits, target_L, MOST_CHANGES)
    if costs.alike and len(load_LE):
        _take_better_of_balanced(chosen_LS, request, load_LE, costs, table)
    return chosen_LS


def table_for(load_LE: Floats, costs: RankCosts, request: PlacementRequest) -> CostTable:
    """The costs as the search reads them."""
    return cost_table(costs, max_tokens=float(load_LE.sum(axis=1).max()), max_active=request.slots_per_rank)


def predict_s_LR(load_LE: Floats, slot_to_expert_LS: Ints, costs: RankCosts) -> Floats:
    """Time of each rank under a placement; ``load_LE`` is of one step. The one judge of every placement."""
    tokens_LR, active_LR = rank_loads(load_LE, slot_to_expert_LS, costs.num_ranks)
    return costs.seconds_LR(tokens_LR, active_LR)


def shared_copies_L(slot_to_expert_LS: Ints, num_ranks: int, most_alike: int = 1) -> Ints:
    """How many slots of each layer hold a copy beyond the ``most_alike`` that their rank may have of an expert."""
    by_rank = np.sort(slot_to_expert_LS.reshape(len(slot_to_expert_LS), num_ranks, -1), axis=2)
    same = by_rank[:, :, most_alike:] == by_rank[:, :, : by_rank.shape[2] - most_alike]
    return np.asarray(np.count_nonzero(same, axis=(1, 2)))


def _take_better_of_balanced(
    chosen_LS: Ints, request: PlacementRequest, load_LE: Floats, costs: RankCosts, table: CostTable
) -> None:
    """Replaces layers that the token balancer places better; first by its own with copies taken apart, if that is as fast."""
    balanced_LS = balance_tokens(
        load_LE,
        num_slots=request.num_slots,
        num_ranks=request.num_ranks,
        num_nodes=request.group_nodes,
        num_groups=request.expert_groups or 1,
    )
    chosen_L, balanced_L = (
        predict_s_LR(load_LE, placed_LS, costs).max(axis=1) for placed_LS in (chosen_LS, balanced_LS)
    )
    shares_L = shared_copies_L(balanced_LS, request.num_ranks, request.limits.most_alike) > 0
    behind_L = np.flatnonzero((balanced_L < chosen_L) & shares_L)
    if len(behind_L):
        apart_LS, apart_L = _as_fast_apart(
            load_LE[behind_L], balanced_LS[behind_L], balanced_L[behind_L], costs, table, request.limits
        )
        better_L = apart_L < chosen_L[behind_L]
        chosen_LS[behind_L[better_L]] = apart_LS[better_L]
        chosen_L[behind_L[better_L]] = apart_L[better_L]
    taken_L = balanced_L * (1.0 + ROUNDING_FRAC) < chosen_L
    chosen_LS[taken_L] = balanced_LS[taken_L]


def _as_fast_apart(
    load_LE: Floats, balanced_LS: Ints, balanced_L: Floats, costs: RankCosts, table: CostTable, limits: Limits
) -> tuple[Ints, Floats]:
    """(placements without shared copies, as fast as the balanced ones or as near as was found; seconds of each layer)."""
    apart_LS, target_L = take_apart(load_LE, balanced_LS, table, limits, MOST_CHANGES)
    apart_L = predict_s_LR(load_LE, apart_LS, costs).max(axis=1)
    slower_L = np.flatnonzero(apart_L > balanced_L * (1.0 + ROUNDING_FRAC))
    if len(slower_L):
        search_apart(load_LE, apart_LS, table, limits, target_L, slower_L)
        apart_L = predict_s_LR(load_LE, apart_LS, costs).max(axis=1)
    return apart_LS, apart_L


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
