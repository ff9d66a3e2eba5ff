"""Another placement for running ranks by few moves, and what it would have brought in windows it was not made from.

A placement fits the noise of the windows that it is made from: predicted on them, it is better than it will be. So it is made
from one half of the windows and judged on the other, and the other way round. Letters: L layers, E experts, S slots, R ranks,
W windows, C changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.plan.anew import table_for
from poise.plan.moves import keep_slots
from poise.plan.observed_costs import Observed, observe
from poise.plan.placement import place_on, predict_s_LR
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import Floats, Ints, RankCosts
from poise.plan.rebalance import Window
from poise.plan.repair import CLOSE_FRAC, repair
from poise.plan.slowest import expected_slowest_s_L

TAIL_FRAC = 0.2
"""The last changes of a layer gain less for each move than the first; below this share of it they are not made."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile:
    """What a placement is made from. ``loads``: windows since routing last drifted; ``paces``: since a rank last left its pace.
    ``curves``: measured ones, which then have the pace that was seen."""

    loads: tuple[Window, ...]
    paces: tuple[Window, ...]
    curves: RankCosts | None

    @property
    def current_LS(self) -> Ints:
        return self.paces[-1].current_LS

    @property
    def mean_load_LE(self) -> Floats:
        """Of one run of a layer."""
        return np.asarray(sum(each.load_LE for each in self.loads) / sum(each.runs for each in self.loads))

    def seen(self) -> Observed | None:
        """Costs, None where nobody computed anything."""
        return observe([each.times for each in self.paces], self.curves)

    def halves(self) -> tuple[Profile, Profile]:
        """The earlier windows and the later ones."""
        loads, paces = len(self.loads) // 2, len(self.paces) // 2
        return (
            Profile(loads=self.loads[:loads], paces=self.paces[:paces], curves=self.curves),
            Profile(loads=self.loads[loads:], paces=self.paces[paces:], curves=self.curves),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rearrangement:
    """``gain_frac``: share of the slowest ranks' time that goes away, as judged on windows it was not made from, and its
    standard error. ``moved``: experts that come to ranks which lack them; 0: nothing pays."""

    slot_to_expert_LS: Ints
    gain_frac: float
    error_frac: float
    moved: int


def rearrange(profile: Profile, seen: Observed, *, noise_L: Floats, least_gain_s: float) -> Rearrangement:
    """From two or more windows in each half. ``seen``: the profile's costs. ``noise_L``: as ``load_noise_L`` gives it; no layer
    is changed for less. ``least_gain_s``: a change is made where it makes a step so much shorter for each move.
    """
    current_LS = profile.current_LS
    chosen_LS = _few_moves(profile, seen, noise_L, least_gain_s)
    moved = arrivals(current_LS, chosen_LS, profile.paces[-1].num_ranks)
    gains_W = [0.0, 0.0]
    first, second = profile.halves()
    first_seen, second_seen = first.seen(), second.seen()
    if moved and first_seen is not None and second_seen is not None:
        gains_W = [
            *_gains(first, first_seen, second, second_seen, current_LS, noise_L, least_gain_s),
            *_gains(second, second_seen, first, first_seen, current_LS, noise_L, least_gain_s),
        ]
    return Rearrangement(
        slot_to_expert_LS=chosen_LS,
        gain_frac=float(np.mean(gains_W)),
        error_frac=float(np.std(gains_W, ddof=1) / np.sqrt(len(gains_W))),
        moved=moved,
    )


def slowest_s(window: Window, slot_to_expert_LS: Ints, seen: Observed) -> float:
    """What the slowest ranks are expected to take in all of a window, were experts placed so."""
    step_L = expected_slowest_s_L(window.load_LE / window.runs, slot_to_expert_LS, seen.costs, seen.scatter_R)
    return float(step_L.sum()) * window.runs


def load_noise_L(profile: Profile, seen: Observed) -> Floats:
    """How far the ranks' shares of each layer's time are off because windows differ: from one half of them to the other."""
    shares = []
    for half in profile.halves():
        time_LR = predict_s_LR(half.mean_load_LE, profile.current_LS, seen.costs)
        shares.append(time_LR / np.maximum(time_LR.mean(axis=1, keepdims=True), 1e-300))
    return np.asarray(np.sqrt((((shares[0] - shares[1]) / 2.0) ** 2).mean(axis=1)))


def arrivals(before_LS: Ints, after_LS: Ints, num_ranks: int) -> int:
    """Experts that come to ranks which lack them."""
    by_rank = (len(before_LS), num_ranks, -1)
    rows = zip(before_LS.reshape(by_rank), after_LS.reshape(by_rank), strict=True)
    return sum(len(np.setdiff1d(new_S, old_S)) for old, new in rows for old_S, new_S in zip(old, new, strict=True))


def _gains(
    made_from: Profile,
    costs: Observed,
    judge: Profile,
    judge_costs: Observed,
    current_LS: Ints,
    noise_L: Floats,
    least_gain_s: float,
) -> list[float]:
    """What a placement made from some windows would have brought in each of others, at the pace that ranks had there."""
    fitted_LS = _few_moves(made_from, costs, noise_L, least_gain_s)
    return [
        1.0 - slowest_s(each, fitted_LS, judge_costs) / slowest_s(each, current_LS, judge_costs) for each in judge.loads
    ]


def _few_moves(profile: Profile, seen: Observed, noise_L: Floats, least_gain_s: float) -> Ints:
    """The current placement with the changes that pay, best first."""
    window, load_LE, current_LS = profile.paces[-1], profile.mean_load_LE, profile.current_LS
    request = PlacementRequest(load_LE=load_LE, num_ranks=window.num_ranks, slots_per_rank=window.slots_per_rank)
    goal_s_L = place_on(request, seen.costs, expert_bytes=1).predicted_s_L
    repaired = repair(
        load_LE,
        np.zeros(load_LE.shape, dtype=np.int64),
        current_LS,
        table_for(load_LE, seen.costs, request),
        request.limits,
        goal_s_L=goal_s_L * (1.0 + np.maximum(CLOSE_FRAC, noise_L)),
        least_gain_frac=0.0,
    )
    changes_LC5, seconds_LC = repaired.changes_LC5, repaired.seconds_LC
    runs_per_step = sum(each.runs for each in profile.loads) / sum(each.steps for each in profile.loads)
    chosen_LS = current_LS.copy()
    for layer, count in enumerate(repaired.counts_L):
        kept = _worthwhile(changes_LC5[layer, :count, 4], seconds_LC[layer, : count + 1], least_gain_s / runs_per_step)
        for slot, expert, other_slot, other_expert, _ in changes_LC5[layer, :kept]:
            chosen_LS[layer, slot] = expert
            if other_slot >= 0:
                chosen_LS[layer, other_slot] = other_expert
    return keep_slots(current_LS, chosen_LS, window.num_ranks)


def _worthwhile(moves_C: Ints, seconds_C: Floats, least_gain_s: float) -> int:
    """How many of the changes to make: as long as the best of the further stretches gains enough for each move."""
    made, enough_s = 0, least_gain_s
    while made < len(moves_C):
        rate_C = (seconds_C[made] - seconds_C[made + 1 :]) / np.cumsum(moves_C[made:])
        best = int(np.argmax(rate_C))
        if rate_C[best] <= enough_s:
            break
        enough_s = max(enough_s, TAIL_FRAC * float(rate_C[best]))
        made += best + 1
    return made
