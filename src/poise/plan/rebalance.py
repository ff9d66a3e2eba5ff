"""When running ranks get another placement, and which: what a policy is, and EPLB by the clock. ViBE's is ``engine.vibe``.

A policy is given every window of what was observed, and answers with a proposal or nothing: no clock, no communication.
Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from poise.plan.eplb import balance_tokens
from poise.plan.observed_costs import Times, observe
from poise.plan.placement import predict_s_LR
from poise.plan.rank_costs import Floats, Ints, RankCosts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """What all ranks saw in ``steps`` passes. ``load_LE``: (token, expert) pairs of all of them together.

    ``times``: of every layer of every pass. ``current_LS``: the placement behind the last pass; ``is_settled``: they ran under
    it throughout, and no expert was on its way. ``move_s``: what bringing an expert to another rank takes.
    """

    load_LE: Floats
    steps: int
    times: Times
    current_LS: Ints
    is_settled: bool = True
    move_s: float = 0.0

    @property
    def num_ranks(self) -> int:
        return int(self.times.tokens_NR.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return int(self.current_LS.shape[1]) // self.num_ranks

    @property
    def runs(self) -> float:
        """How often each layer ran: twice in a pass in halves."""
        return max(1.0, len(self.times.seconds_NR) / len(self.load_LE))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Proposal:
    """``gain_frac``: how much shorter the slowest ranks' time is predicted to become, 0 to 1; None: not asked."""

    slot_to_expert_LS: Ints
    reason: str
    gain_frac: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a proposal: by how much shorter the slowest ranks' time became than it would have been without, 0 to 1
    (below 0: longer), give or take ``error_frac`` (standard error)."""

    gain_frac: float
    error_frac: float


class Planner(Protocol):
    """A policy at work. ``outcomes``: of the proposals so far, in their order; None: not known, or not yet."""

    @property
    def outcomes(self) -> Sequence[Outcome | None]: ...

    def propose(self, window: Window) -> Proposal | None:
        """Is given every window, in order. A proposal is carried out in any case, and takes some windows."""
        ...


class Rebalance(Protocol):
    """A policy. ``interval``: passes in a window."""

    @property
    def interval(self) -> int: ...

    def start(self, curves: RankCosts | None) -> Planner:
        """``curves``: of the ranks, where they were measured before."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Eplb:
    """The engines' baseline: every ``interval`` passes the tokens are balanced anew, whatever that moves."""

    interval: int = 64

    def start(self, curves: RankCosts | None) -> Planner:
        return _Eplb()


class _Eplb:
    def __init__(self) -> None:
        self.outcomes: Sequence[Outcome | None] = ()
        self._awaited_LS: Ints | None = None

    def propose(self, window: Window) -> Proposal | None:
        """A placement that balances tokens, if it is another one."""
        if self._awaited_LS is not None and np.array_equal(window.current_LS, self._awaited_LS):
            self._awaited_LS = None
        if self._awaited_LS is not None or not window.is_settled:
            return None
        slots = window.current_LS.shape[1]
        chosen_LS = balance_tokens(window.load_LE, num_slots=slots, num_ranks=window.num_ranks)
        if np.array_equal(chosen_LS, window.current_LS):
            return None
        self._awaited_LS = chosen_LS
        return Proposal(
            slot_to_expert_LS=chosen_LS,
            reason=f"{window.steps} passes are over",
            gain_frac=_gain_frac(window, chosen_LS),
        )


def _gain_frac(window: Window, chosen_LS: Ints) -> float | None:
    """The share of the slowest ranks' time, summed over layers, that goes away, at the window's mean load."""
    seen = observe([window.times])
    if seen is None or not window.load_LE.any():
        return None
    before_s, after_s = (
        float(predict_s_LR(window.load_LE / window.runs, slots_LS, seen.costs).max(axis=1).sum())
        for slots_LS in (window.current_LS, chosen_LS)
    )
    return 1.0 - after_s / before_s
