"""The exact optimum of a small step as a mixed-integer program (SciPy's HiGHS), for linear costs: what plans are held against.

Letters: R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.cost.curves import ClosedFormCurve
from poise.cost.experts import ExpertCurve
from poise.plan.balance import Balancer, Strategy
from poise.plan.rank_costs import RankCosts

EXPERT_BYTES = 1e6
LINK = 1e9
GAP_FRAC = 2e-3
"""By which a solution may lie above the optimum."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SmallCase:
    """Experts in order on ranks. ``active_s``, ``token_s``: of an active expert and a token at speed 1; ``way_s``: of a token
    there and back. ``slots``, ``gives``: replicas that a rank can take in, and its window lets out."""

    counts_RE: npt.NDArray[np.int32]
    speed_R: npt.NDArray[np.float64]
    active_s: float
    token_s: float
    way_s: float
    slots: int
    gives: int

    @property
    def costs(self) -> RankCosts:
        curve = ExpertCurve({1: ClosedFormCurve(self.active_s, self.token_s, 1.0)})
        return RankCosts.of_curves([curve] * len(self.speed_R), self.speed_R)

    def plan_s(self, strategy: Strategy, **options: Any) -> float:
        """The slowest rank in our plan."""
        ranks, experts = self.counts_RE.shape
        balancer = Balancer(
            self.costs,
            np.arange(experts),
            num_experts=experts,
            link_bytes_per_s_R=LINK,
            token_bytes=self.way_s * LINK / 2.0,
            expert_bytes=EXPERT_BYTES,
            most_tokens=float(self.counts_RE.sum()),
            replica_slots=self.slots,
            strategy=strategy,
            **options,
        )
        window_s_R = np.full(ranks, (self.gives + 0.5) * EXPERT_BYTES / LINK)
        return balancer.choose_replicas(self.counts_RE, window_s_R).predicted_s


def small_cases(*, seeds: int) -> list[SmallCase]:
    """3 and 4 ranks; links from a tenth of the experts' time to more than it; active experts cheap and dear; unequal ranks."""
    return [
        _case(*size, way_frac, active_s, seed)
        for seed in range(seeds)
        for size in ((3, 6, 1, 9), (3, 6, 2, 2), (4, 8, 2, 2), (4, 8, 1, 9))
        for way_frac, active_s in ((0.5, 20e-6), (0.1, 20e-6), (1.5, 20e-6), (0.5, 200e-6))
    ]


def _case(ranks: int, experts: int, slots: int, gives: int, way_frac: float, active_s: float, seed: int) -> SmallCase:
    rng = np.random.default_rng([seed, ranks])
    share_E = rng.permutation(1.0 / np.arange(1, experts + 1) ** (0.7, 1.0, 1.4)[seed % 3])
    share_RE = share_E * rng.lognormal(0.0, 0.4 * (seed % 2), (ranks, experts))
    share_RE /= share_RE.sum(axis=1, keepdims=True)
    token_s = 0.2e-6
    return SmallCase(
        counts_RE=rng.poisson(6000 * share_RE).astype(np.int32),
        speed_R=rng.uniform(0.7, 1.0, ranks) if seed % 4 == 3 else np.ones(ranks),
        active_s=active_s,
        token_s=token_s,
        way_s=way_frac * token_s,
        slots=slots,
        gives=min(gives, ranks * experts),
    )


def optimum_s(case: SmallCase, *, limit_s: float = 20.0) -> float:
    """The least time of the slowest rank over all replicas and assignments, within ``GAP_FRAC``."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    ranks, experts = case.counts_RE.shape
    size = experts * ranks
    rows = _Rows()
    _constrain(rows, case)
    integrality, upper, goal = np.zeros(4 * size + 1), np.full(4 * size + 1, np.inf), np.zeros(4 * size + 1)
    integrality[size : 2 * size], upper[size : 2 * size], goal[-1] = 1, 1.0, 1.0
    matrix = csr_matrix((rows.values, (rows.row, rows.column)), shape=(len(rows.low), 4 * size + 1))
    solved = milp(
        goal,
        constraints=LinearConstraint(matrix, rows.low, rows.high),
        integrality=integrality,
        bounds=Bounds(np.zeros(4 * size + 1), upper),
        options={"mip_rel_gap": GAP_FRAC, "time_limit": limit_s},
    )
    assert solved.x is not None, solved.message
    return float(solved.fun) * 1e-6


class _Rows:
    """A sparse matrix of constraints as it grows."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.column: list[int] = []
        self.values: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, low: float, high: float, *entries: tuple[int, float]) -> None:
        for column, value in entries:
            self.row.append(len(self.low))
            self.column.append(int(column))
            self.values.append(float(value))
        self.low.append(low)
        self.high.append(high)


def _constrain(rows: _Rows, case: SmallCase) -> None:
    """Columns: quotas, active copies (0 or 1), tokens in and out of each (expert, rank), then the time, in microseconds."""
    ranks, experts = case.counts_RE.shape
    quota, active, come, leave = np.arange(4 * experts * ranks).reshape(4, experts, ranks)
    last, home_E = 4 * experts * ranks, np.arange(experts) // (experts // ranks)
    for e in range(experts):
        total = float(case.counts_RE[:, e].sum())
        rows.add(total, total, *((column, 1.0) for column in quota[e]))
        for r in range(ranks):
            born = float(case.counts_RE[r, e])
            rows.add(-np.inf, 0.0, (quota[e, r], 1.0), (active[e, r], -total))
            rows.add(-born, np.inf, (come[e, r], 1.0), (quota[e, r], -1.0))
            rows.add(born, np.inf, (leave[e, r], 1.0), (quota[e, r], 1.0))
    for r in range(ranks):
        rows.add(0.0, case.slots, *((active[e, r], 1.0) for e in range(experts) if home_E[e] != r))
        given = [active[e, k] for e in range(experts) if home_E[e] == r for k in range(ranks) if k != r]
        rows.add(0.0, case.gives, *((column, 1.0) for column in given))
        costs = [(column, 1e6 * case.token_s / case.speed_R[r]) for column in quota[:, r]]
        costs += [(column, 1e6 * case.active_s / case.speed_R[r]) for column in active[:, r]]
        for way in (come, leave):
            ways = [(column, 1e6 * case.way_s) for column in way[:, r]]
            rows.add(-np.inf, 0.0, *costs, *ways, (last, -1.0))
