"""When running ranks get another placement, and which: EPLB by the clock, ViBE when it pays.

Policies are pure: a window of what was observed in, a proposal or nothing out. Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from poise.plan.eplb import balance_tokens
from poise.plan.observed_costs import ObservedCost, rank_costs
from poise.plan.placement import place_on, predict_s_LR
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import Floats, Ints


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """What all ranks saw in ``steps`` passes. ``load_LE``: (token, expert) pairs of all of them together.

    ``costs_R``: of each rank, None where it computed nothing. ``current_LS``: the placement they ran under.
    """

    load_LE: Floats
    steps: int
    costs_R: tuple[ObservedCost | None, ...]
    current_LS: Ints

    @property
    def num_ranks(self) -> int:
        return len(self.costs_R)

    @property
    def slots_per_rank(self) -> int:
        return int(self.current_LS.shape[1]) // self.num_ranks


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Proposal:
    """``gain_frac``: how much shorter the experts' time becomes, as predicted from the window, 0 to 1; None: not asked."""

    slot_to_expert_LS: Ints
    reason: str
    gain_frac: float | None


class Rebalance(Protocol):
    """A policy. ``interval``: passes in a window."""

    @property
    def interval(self) -> int: ...

    def propose(self, window: Window) -> Proposal | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Eplb:
    """The engines' baseline: every ``interval`` passes the tokens are balanced anew, whatever that moves."""

    interval: int = 64

    def propose(self, window: Window) -> Proposal | None:
        """A placement that balances tokens, if it is another one."""
        slots = window.current_LS.shape[1]
        chosen_LS = balance_tokens(window.load_LE, num_slots=slots, num_ranks=window.num_ranks)
        if np.array_equal(chosen_LS, window.current_LS):
            return None
        costs = rank_costs(list(window.costs_R))
        gain = None if costs is None else _gain(window, predict_s_LR(window.load_LE / window.steps, chosen_LS, costs))
        return Proposal(slot_to_expert_LS=chosen_LS, reason=f"{window.steps} passes are over", gain_frac=gain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vibe:
    """Speed-aware: the placement that all ranks finish soonest with, at the pace they were seen to have.

    It changes when the slowest ranks' time would shrink by ``least_gain_frac`` or more, and then by as few moves as bring it
    within 1 % of a new placement, ``max_moves`` at most at a time.
    """

    interval: int = 16
    least_gain_frac: float = 0.05
    max_moves: int | None = None

    def propose(self, window: Window) -> Proposal | None:
        """A placement that pays, if there is one."""
        costs = rank_costs(list(window.costs_R))
        if costs is None or not window.load_LE.any():
            return None
        request = PlacementRequest(
            load_LE=window.load_LE,
            num_ranks=window.num_ranks,
            slots_per_rank=window.slots_per_rank,
            steps=window.steps,
            current_LS=window.current_LS,
            max_moves=self.max_moves,
        )
        plan = place_on(request, costs, expert_bytes=1)
        gain = _gain(window, plan.predicted_s_LR)
        if gain is None or gain < self.least_gain_frac:
            return None
        return Proposal(
            slot_to_expert_LS=plan.slot_to_expert_LS,
            reason=f"experts are predicted to take {100 * gain:.0f} % less time",
            gain_frac=gain,
        )


def _gain(window: Window, after_s_LR: Floats) -> float | None:
    """The share of the slowest ranks' time, summed over layers, that goes away."""
    costs = rank_costs(list(window.costs_R))
    assert costs is not None, "a gain is predicted where there are costs"
    before_s = float(predict_s_LR(window.load_LE / window.steps, window.current_LS, costs).max(axis=1).sum())
    return 1.0 - float(after_s_LR.max(axis=1).sum()) / before_s if before_s > 0 else None
