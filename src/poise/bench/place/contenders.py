"""Who places the experts of a case: the planner, the token balancer, and vLLM's own policy where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from poise.bench.place.cases import Case, Floats
from poise.plan.eplb import balance_tokens
from poise.plan.placement import PlacementPlan, place_on
from poise.plan.placement_request import LEAST_GAIN_FRAC, PlacementRequest
from poise.plan.rank_costs import Ints


def plan(
    case: Case,
    *,
    load_LE: Floats | None = None,
    current_LS: Ints | None = None,
    max_moves: int | None = None,
    least_gain_frac: float = LEAST_GAIN_FRAC,
) -> PlacementPlan:
    """The planner's; ``load_LE``: None is the case's own."""
    request = PlacementRequest(
        load_LE=case.load_LE if load_LE is None else load_LE,
        num_ranks=case.num_ranks,
        slots_per_rank=case.slots_per_rank,
        current_LS=current_LS,
        max_moves=max_moves,
        least_gain_frac=least_gain_frac,
    )
    return place_on(request, case.costs, expert_bytes=1)


def balance(case: Case, load_LE: Floats) -> Ints:
    """DeepSeek's EPLB, flat."""
    return balance_tokens(load_LE, num_slots=case.num_ranks * case.slots_per_rank, num_ranks=case.num_ranks)


def vllm_policy() -> Callable[[Floats, int, int], Ints] | None:
    """vLLM's default policy, flat; None where the package is not installed."""
    try:
        policy = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES["default"]
    except ImportError:
        return None
    import torch

    def balance(load_LE: Floats, slots: int, ranks: int) -> Ints:
        placed: Ints = policy.rebalance_experts(torch.from_numpy(load_LE), slots, 1, 1, ranks).numpy()
        return placed

    return balance
