"""What no plan of one step can beat: a lower bound on the slowest rank, from counts, curves, links, slots and windows.

- Work and wires: a rank does at most ``best_rate(y)`` of tokens + y * active experts in a second, for any price y of an active
  expert. Tokens born on a rank that its copies cannot keep go out; they can keep those of its own experts and of so many
  others as there are slots, and as the others' windows let out. Each of these holds for every rank, so also summed up.
- Windows: a rank keeps its experts' tokens but for those of as many experts as its window lets out, and these, with itself, end
  on at most so many further ranks. Experts with other homes are left out.

Letters: R ranks, E experts, S home slots, Y prices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.bound import PRECISION_FRAC, PRICES
from poise.plan.expert_loads import Floats, Ints
from poise.plan.rank_costs import RankCosts

LEAST_S = 1e-9


def step_bound_s(
    counts_RE: npt.NDArray[np.integer],
    slot_to_expert_S: Ints,
    costs: RankCosts,
    *,
    token_s_R: Floats,
    slots_R: npt.NDArray[np.integer],
    gives_R: npt.NDArray[np.integer],
) -> float:
    """Seconds; 0 without tokens. ``token_s_R``: of a token there and back over a rank's link. ``slots_R``, ``gives_R``:
    replicas that a rank may take in and give."""
    if not counts_RE.any():
        return 0.0
    home_ER = _homes(slot_to_expert_S, counts_RE.shape)
    work_s = _work_s(counts_RE, home_ER, costs, token_s_R, slots_R, gives_R)
    return max(work_s, _window_s(counts_RE.sum(axis=0), home_ER, costs, gives_R))


def _homes(slot_to_expert_S: Ints, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    ranks, experts = shape
    home_ER = np.zeros((experts, ranks), dtype=bool)
    home_ER[slot_to_expert_S, np.arange(len(slot_to_expert_S)) // (len(slot_to_expert_S) // ranks)] = True
    return home_ER


def _work_s(
    counts_RE: npt.NDArray[np.integer],
    home_ER: npt.NDArray[np.bool_],
    costs: RankCosts,
    token_s_R: Floats,
    slots_R: npt.NDArray[np.integer],
    gives_R: npt.NDArray[np.integer],
) -> float:
    rate_YR = (np.stack([curve.best_rate(PRICES) for curve in costs.curves])[costs.curve_R] * costs.speed_R[:, None]).T
    work_Y = counts_RE.sum() + PRICES * (counts_RE.sum(axis=0) > 0).sum()
    weight_YR = rate_YR * token_s_R
    away_RE = np.where(home_ER.T, 0, counts_RE)  # born where no home is
    heaviest_RE = -np.sort(-away_RE, axis=1)
    kept_R = np.array([row[:slots].sum() for row, slots in zip(heaviest_RE, slots_R, strict=True)])
    out_Y = (weight_YR * (away_RE.sum(axis=1) - kept_R)).sum(axis=1)
    given = sum(_given(away_RE[:, home_ER[:, rank]], int(gives)) for rank, gives in enumerate(gives_R))
    few_out_Y = weight_YR.min(axis=1) * max(0.0, away_RE.sum() - given)
    return float(((work_Y + np.maximum(out_Y, few_out_Y)) / rate_YR.sum(axis=1)).max())


def _given(away_RE: npt.NDArray[np.integer], gives: int) -> float:
    """The most tokens that copies of a rank's experts can keep elsewhere."""
    return float(-np.sort(-away_RE, axis=None)[:gives].sum())


def _window_s(
    total_E: Ints, home_ER: npt.NDArray[np.bool_], costs: RankCosts, gives_R: npt.NDArray[np.integer]
) -> float:
    own_ER = np.where(home_ER & (home_ER.sum(axis=1) == 1)[:, None], total_E[:, None], 0)
    all_R = own_ER.sum(axis=0)
    heaviest_ER = -np.sort(-own_ER, axis=0)
    stays_R = np.array([heaviest_ER[gives:, rank].sum() for rank, gives in enumerate(gives_R)])
    floors = [curve.floor() for curve in costs.curves]
    low, high = 0.0, 1.0
    while high - low > PRECISION_FRAC * high:
        middle = (low + high) / 2
        can_R = np.zeros(len(all_R))
        for index, floor in enumerate(floors):
            ranks = costs.curve_R == index
            can_R[ranks] = floor.tokens_within(middle * costs.speed_R[ranks])
        most = np.append(0.0, np.cumsum(-np.sort(-can_R)))
        with_others_R = can_R + most[np.minimum(gives_R, len(all_R) - 1)]
        if (can_R >= stays_R).all() and (with_others_R >= all_R).all():
            high = middle
        else:
            low = middle
        if high < LEAST_S:
            break
    return low
