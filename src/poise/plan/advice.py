"""Whether a new placement is worth it: predicted time now, planned, token-balanced, bound; and a gain beside its noise.

The gain is cross-validated: the steps are cut into up to eight stretches of time, each is judged under a plan made from the
others, so a plan that fits the noise of its own loads, or loads that drift, do not look like a gain. Noise is the 95 %
interval of the mean of those gains (Student's t), and never less than 1 %: measured curves are not better known.
Pure: arrays in, a frozen result out.
Letters: N steps, L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.plan.eplb import balance_tokens
from poise.plan.expert_loads import Floats, Ints
from poise.plan.placement import PlacementPlan, place_on, predict_s_LR
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import RankCosts

STRETCHES = 8
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""Two-sided 95 % quantiles of Student's t for 1 to 7 degrees of freedom."""
LEAST_NOISE_FRAC = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementAdvice:
    """Times are of one mean step, in seconds, by layer and rank. ``now_s_LR``: under the current or the contiguous placement.

    ``held_out_gains``: share of the time saved in each stretch of steps by a plan that has not seen it; empty for one step.
    """

    plan: PlacementPlan
    now_s_LR: Floats
    token_balanced_s_LR: Floats
    held_out_gains: tuple[float, ...]

    @property
    def now_s(self) -> float:
        """All layers, each as slow as its slowest rank."""
        return _step_s(self.now_s_LR)

    @property
    def planned_s(self) -> float:
        return _step_s(self.plan.predicted_s_LR)

    @property
    def token_balanced_s(self) -> float:
        """Under DeepSeek's EPLB with the same slots."""
        return _step_s(self.token_balanced_s_LR)

    @property
    def bound_s(self) -> float:
        """No placement in these slots is faster."""
        return float(self.plan.bound_s_L.sum())

    @property
    def gain_frac(self) -> float:
        """Share of the time now that the plan saves: held out where there is more than one step."""
        if self.held_out_gains:
            return float(np.mean(self.held_out_gains))
        return 1.0 - self.planned_s / self.now_s if self.now_s > 0 else 0.0

    @property
    def noise_frac(self) -> float:
        """How far the 95 % interval of the held-out gains' mean reaches, at least 1 %."""
        if len(self.held_out_gains) < 2:
            return LEAST_NOISE_FRAC
        error = float(np.std(self.held_out_gains, ddof=1)) / math.sqrt(len(self.held_out_gains))
        return max(LEAST_NOISE_FRAC, STUDENT_95[len(self.held_out_gains) - 2] * error)

    @property
    def is_worth_it(self) -> bool:
        return self.gain_frac > self.noise_frac


def advise(
    load_NLE: npt.NDArray[np.generic], request: PlacementRequest, costs: RankCosts, *, expert_bytes: int
) -> PlacementAdvice:
    """A plan and its worth. ``load_NLE``: tokens of each step; ``request``: the rest, its own load and steps are replaced."""
    parts = np.array_split(load_NLE, min(STRETCHES, len(load_NLE)))
    sums = [np.asarray(part.sum(axis=0, dtype=float)) for part in parts]
    total_LE = np.sum(sums, axis=0)
    whole = replace(request, load_LE=total_LE, steps=len(load_NLE))
    now_LS = contiguous_LS(whole) if whole.current is None else whole.current
    gains = []
    for part_LE, part in zip(sums, parts, strict=True):
        if len(parts) > 1:
            rest = replace(request, load_LE=total_LE - part_LE, steps=len(load_NLE) - len(part))
            gains.append(_gain(part_LE / len(part), now_LS, place_on(rest, costs, expert_bytes=expert_bytes), costs))
    mean_LE = whole.step_load_LE
    balanced_LS = balance_tokens(
        mean_LE,
        num_slots=request.num_slots,
        num_ranks=costs.num_ranks,
        num_nodes=request.group_nodes,
        num_groups=request.expert_groups or 1,
    )
    return PlacementAdvice(
        plan=place_on(whole, costs, expert_bytes=expert_bytes),
        now_s_LR=predict_s_LR(mean_LE, now_LS, costs),
        token_balanced_s_LR=predict_s_LR(mean_LE, balanced_LS, costs),
        held_out_gains=tuple(gains),
    )


def contiguous_LS(request: PlacementRequest) -> Ints:
    """What engines start with: slot s holds expert s mod E."""
    row_S = np.arange(request.num_slots, dtype=np.int64) % request.num_experts
    return np.tile(row_S, (len(request.load_LE), 1))


def _gain(load_LE: Floats, now_LS: Ints, plan: PlacementPlan, costs: RankCosts) -> float:
    now_s = _step_s(predict_s_LR(load_LE, now_LS, costs))
    planned_s = _step_s(predict_s_LR(load_LE, plan.slot_to_expert_LS, costs))
    return 1.0 - planned_s / now_s if now_s > 0 else 0.0


def _step_s(seconds_LR: Floats) -> float:
    return float(seconds_LR.max(axis=1).sum())
