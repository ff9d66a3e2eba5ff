"""What no placement can beat: a lower bound on the time of a layer's slowest rank, from curves, loads and slots alone.

The smallest T that meets all of these, each of which every placement meets, however copies share an expert's tokens:

- Work: no rank does more than ``best_rate(y)`` of tokens + y * active experts in a second, for any price y of an active expert.
- Capacity: the tokens that ranks finish within T, ``sum_r f_r^-1(T)``, are the load; what the fastest t ranks hold is at most
  the t * slots heaviest experts, so the others must take the rest.
- Copies: an expert needs so many ranks that together they can take it; all those copies must fit into the slots.
- Pigeonhole: of the heaviest n experts, ranks can hold only so many each.
- Slots: where ranks differ, even the slowest fills its slots, at least with the lightest experts in many copies.

A rank's slots are all filled, so beside what is counted there lie at least the lightest experts. Valid for any curves; the last
for copies that share tokens evenly and do not share a rank, as the planner places them.
Letters: L layers, E experts, R ranks, Y prices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, active_share
from poise.plan.rank_costs import RankCosts

PRICES = np.concatenate([[0.0], np.geomspace(1e-3, 1e5, 320)])
"""Tokens per active expert. Any set of them gives a bound; more give a closer one."""
PRECISION_FRAC = 2e-5
LEAST_ACTIVE = 1e-6
ROUNDING_FRAC = 1e-9

Fits = Callable[[Floats, npt.NDArray[np.intp]], npt.NDArray[np.bool_]]


def bound_s_L(load_LE: Floats, costs: RankCosts, *, slots_per_rank: int) -> Floats:
    """Seconds, shape (L,); 0 for a layer without load. ``load_LE``: tokens of each expert in one step."""
    sorted_LE = -np.sort(-load_LE, axis=1)
    spare = costs.num_ranks * slots_per_rank - load_LE.shape[1]
    work_L = _work_bound_s_L(sorted_LE, costs, spare) * (1.0 - ROUNDING_FRAC)
    if not costs.alike and slots_per_rank <= load_LE.shape[1]:
        work_L = np.maximum(work_L, _slots_bound_s_L(sorted_LE, costs, slots_per_rank, spare) * (1.0 - ROUNDING_FRAC))
    summed_LE = np.concatenate([np.zeros((len(load_LE), 1)), np.cumsum(sorted_LE, axis=1)], axis=1)
    whole = max(0, slots_per_rank - spare)
    least_active = float(active_share(sorted_LE[:, load_LE.shape[1] - whole :]).sum(axis=1).min())
    rank_curves = [curve.floor().repeated(max(least_active, LEAST_ACTIVE)) for curve in costs.curves]

    def fits(seconds_L: Floats, layers: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        capacity_LR = np.zeros((len(layers), costs.num_ranks))
        for index, curve in enumerate(rank_curves):
            ranks = costs.curve_R == index
            capacity_LR[:, ranks] = curve.tokens_within(seconds_L[:, None] * costs.speed_R[ranks])
        capacity_LR = -np.sort(-capacity_LR, axis=1) * (1.0 + ROUNDING_FRAC)
        return np.asarray(_layers_fit(capacity_LR, summed_LE[layers], slots_per_rank, spare))

    return _smallest(fits, work_L)


def _smallest(fits: Fits, low_L: Floats) -> Floats:
    """The smallest time from ``low_L`` up that fits, of each layer; from below."""
    low_L = low_L.copy()
    open_L = np.flatnonzero(low_L > 0)
    open_L = open_L[~fits(low_L[open_L], open_L)]
    high_L = low_L * 1.02
    growing_L = open_L
    while len(growing_L):
        growing_L = growing_L[~fits(high_L[growing_L], growing_L)]
        low_L[growing_L] = high_L[growing_L]
        high_L[growing_L] *= 2.0
    while len(open_L):
        middle_L = (low_L[open_L] + high_L[open_L]) / 2
        fit = fits(middle_L, open_L)
        high_L[open_L[fit]], low_L[open_L[~fit]] = middle_L[fit], middle_L[~fit]
        open_L = open_L[high_L[open_L] > low_L[open_L] * (1.0 + PRECISION_FRAC)]
    return low_L


def _work_bound_s_L(sorted_LE: Floats, costs: RankCosts, spare: int) -> Floats:
    """Tokens and active slots of the whole layer, at each price, over what all ranks do in a second."""
    rate_BY = np.stack([curve.best_rate(PRICES) for curve in costs.curves])
    rate_Y = (rate_BY[costs.curve_R] * costs.speed_R[:, None]).sum(axis=0)
    lightest_L = sorted_LE[:, -1]
    copies_L = (1 + spare) * active_share(lightest_L / (1 + spare)) - active_share(lightest_L)
    active_L = (
        active_share(sorted_LE).sum(axis=1) + copies_L
    )  # further copies cost least at the lightest expert, all there
    work_LY = sorted_LE.sum(axis=1)[:, None] + PRICES * active_L[:, None]
    return np.asarray((work_LY / rate_Y).max(axis=1))


def _slots_bound_s_L(sorted_LE: Floats, costs: RankCosts, slots_per_rank: int, spare: int) -> Floats:
    """What the slowest rank takes for as many of the lightest experts as it has slots, each split as often as can be."""
    tokens_LS = sorted_LE[:, -slots_per_rank:] / min(costs.num_ranks, 1 + spare)
    tokens_L, active_L = tokens_LS.sum(axis=1), np.maximum(active_share(tokens_LS).sum(axis=1), LEAST_ACTIVE)
    seconds_BL = np.stack([active_L * curve.floor().seconds(tokens_L / active_L) for curve in costs.curves])
    return np.asarray((seconds_BL[costs.curve_R] / costs.speed_R[:, None]).max(axis=0))


@compiled
def _layers_fit(capacity_LR: Floats, summed_LE: Floats, slots_per_rank: int, spare: int) -> npt.NDArray[np.bool_]:
    fit_L = np.zeros(len(capacity_LR), dtype=np.bool_)
    for layer in range(len(capacity_LR)):
        capacity_R, summed_E = capacity_LR[layer], summed_LE[layer]
        fit_L[layer] = (
            _others_take_the_rest(capacity_R, summed_E, slots_per_rank)
            and _copies_fit(capacity_R, summed_E, slots_per_rank, spare)
            and _heaviest_fit(capacity_R, summed_E, slots_per_rank, spare)
        )
    return fit_L


@compiled
def _lightest(summed_E: Floats, count: int) -> float:
    """Weight of the lightest ``count`` experts. ``summed_E[n]``: of the heaviest n."""
    last = len(summed_E) - 1
    return float(summed_E[last] - summed_E[last - max(count, 0)])


@compiled
def _others_take_the_rest(capacity_R: Floats, summed_E: Floats, slots_per_rank: int) -> bool:
    last = len(summed_E) - 1
    left = capacity_R.sum()
    for fastest in range(len(capacity_R)):
        if left < summed_E[last] - summed_E[min(last, fastest * slots_per_rank)]:
            return False
        left -= capacity_R[fastest]
    return True


@compiled
def _copies_fit(capacity_R: Floats, summed_E: Floats, slots_per_rank: int, spare: int) -> bool:
    beside = _lightest(summed_E, slots_per_rank - 1 - spare)
    further = 0
    for expert in range(len(summed_E) - 1):
        load = summed_E[expert + 1] - summed_E[expert]
        taken, ranks = 0.0, 0
        while taken < load:
            if ranks == len(capacity_R) or capacity_R[ranks] <= beside:
                return False
            taken += capacity_R[ranks] - beside
            ranks += 1
        if ranks <= 1:
            break
        further += ranks - 1
        if further > spare:
            return False
    return True


@compiled
def _heaviest_fit(capacity_R: Floats, summed_E: Floats, slots_per_rank: int, spare: int) -> bool:
    """At most ``spare`` experts have copies, so of the heaviest n at least n - spare lie whole, weakest if these are the
    lightest of them."""
    step = max(1, len(capacity_R) // 4)
    for count in range(spare + 1, len(summed_E), step):
        held, fewest = 0, min(slots_per_rank, count - spare)
        for rank in range(len(capacity_R) - 1, -1, -1):
            held += _most_held(capacity_R[rank], summed_E, count, fewest, slots_per_rank, spare)
        if held < count - spare:
            return False
    return True


@compiled
def _most_held(capacity: float, summed_E: Floats, count: int, most: int, slots_per_rank: int, spare: int) -> int:
    """How many of the heaviest ``count`` experts a rank can hold at most, the lightest of them and beside them."""
    for held in range(most, 0, -1):
        beside = _lightest(summed_E, slots_per_rank - held - spare)
        if summed_E[count] - summed_E[count - held] + beside <= capacity:
            return held
    return 0
