"""Ranks that exist as numbers only: tokens fall by chance, times scatter, ranks are of unequal pace. For tests of policies.

Letters: L layers, E experts, S slots, R ranks, N layers computed (steps x layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from poise.plan.observed_costs import Times
from poise.plan.rearrange import arrivals
from poise.plan.rebalance import Planner, Proposal, Window

EXPERT_S, TOKEN_S = 3e-4, 4e-5


def chances(rng: np.random.Generator, layers: int, experts: int, skew: float) -> np.ndarray:
    """Where tokens go: lognormal over experts."""
    raw_LE = rng.lognormal(0.0, skew, (layers, experts))
    return np.asarray(raw_LE / raw_LE.sum(axis=1, keepdims=True))


@dataclass(kw_only=True)
class NumberRanks:
    """``tokens``: (token, expert) pairs of a step; they come in runs of ``alike`` equal ones, as text does. ``scatter``: of
    each time, ``wander``: of a rank's pace from window to window, ``held_up``: share of times that take ten times as long."""

    seed: int
    layers: int = 4
    experts: int = 32
    slots: int = 10
    tokens: int = 256
    interval: int = 8
    skew: float = 0.7
    scatter: float = 0.15
    wander: float = 0.03
    held_up: float = 0.01
    alike: int = 1
    speed_R: np.ndarray = field(default_factory=lambda: np.ones(4))

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.chance_LE = chances(self.rng, self.layers, self.experts, self.skew)
        ranks = len(self.speed_R)
        first = [
            (rank * self.experts // ranks + slot) % self.experts for rank in range(ranks) for slot in range(self.slots)
        ]
        self.current_LS = np.tile(np.array(first), (self.layers, 1))

    def window(self, *, is_settled: bool = True) -> Window:
        """What they do next."""
        ranks, rng = len(self.speed_R), self.rng
        pace_R = self.speed_R * np.exp(self.wander * rng.normal(size=ranks))
        loads, rows = [], []
        for chance_E, row_S in zip(self.chance_LE, self.current_LS, strict=True):
            count_NE = rng.multinomial(self.tokens // self.alike, chance_E, self.interval) * self.alike
            holds_ER = np.zeros((self.experts, ranks))
            holds_ER[row_S, np.arange(len(row_S)) // self.slots] = 1.0
            share_ER = holds_ER / holds_ER.sum(axis=1, keepdims=True)
            tokens_NR = count_NE @ share_ER
            active_NR = np.minimum(1.0, count_NE[:, :, None] * share_ER).sum(axis=1)
            times_NR = (
                (active_NR * EXPERT_S + tokens_NR * TOKEN_S)
                / pace_R
                * np.exp(self.scatter * rng.normal(size=tokens_NR.shape))
            )
            times_NR *= np.where(rng.random(times_NR.shape) < self.held_up, 10.0, 1.0)
            loads.append(count_NE.sum(axis=0))
            rows.append((tokens_NR, active_NR, times_NR))
        tokens, active, seconds = (
            np.stack([row[part] for row in rows], axis=1).reshape(-1, ranks) for part in range(3)
        )
        return Window(
            load_LE=np.array(loads, dtype=float),
            steps=self.interval,
            times=Times(tokens_NR=tokens, active_NR=active, seconds_NR=seconds),
            current_LS=self.current_LS.copy(),
            is_settled=is_settled,
            move_s=0.02,
        )

    def step_s(self, windows: int = 20) -> float:
        """What the slowest ranks take in a step, layers that are held up apart; looks ahead without going there."""
        state, self.rng, held_up = self.rng, np.random.default_rng(0), self.held_up
        self.held_up = 0.0
        found = sum(self.window().times.slowest_s() for _ in range(windows)) / (windows * self.interval)
        self.rng, self.held_up = state, held_up
        return found


@dataclass(frozen=True, kw_only=True)
class Made:
    """A change of the placement: in which window, how many experts came to other ranks, steps before and behind it."""

    window: int
    moved: int
    proposal: Proposal
    before_s: float
    after_s: float


def carry_out(
    ranks: NumberRanks,
    planner: Planner,
    windows: int,
    events: Mapping[int, Callable[[NumberRanks], None]] | None = None,
) -> list[Made]:
    """Lets ``ranks`` run; what is proposed is in force two windows later. ``events``: before which window what happens."""
    made: list[Made] = []
    for number in range(windows):
        (events or {}).get(number, lambda _: None)(ranks)
        proposal = planner.propose(ranks.window())
        if proposal is None:
            continue
        before_LS, before_s = ranks.current_LS, ranks.step_s()
        assert planner.propose(ranks.window(is_settled=False)) is None, "one change at a time"
        ranks.current_LS = proposal.slot_to_expert_LS.copy()
        moved = arrivals(before_LS, ranks.current_LS, len(ranks.speed_R))
        made.append(Made(window=number, moved=moved, proposal=proposal, before_s=before_s, after_s=ranks.step_s()))
    return made
