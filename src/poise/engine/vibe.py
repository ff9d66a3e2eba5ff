"""ViBE while it runs: watches where tokens go and how fast ranks are, and rearranges experts when that pays.

A change is due (1) once the first profile can be trusted, (2) when routing has drifted from the profile that the placement was
made from, (3) when a rank has left its pace. It is then made only if the gain, judged on windows that it was not made from, is
above noise and above what is worth a change, and with as few moves as pay. What came of it is compared with what was predicted;
where it did not come, the next change needs more. Numbers in, proposals out: no clock, no communication.
Source: ViBE (arXiv 2606.00735), recalibration. Letters: L layers, E experts, S slots, R ranks, W windows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from poise.plan.observed_costs import Observed
from poise.plan.rank_costs import Ints, RankCosts
from poise.plan.rearrange import Profile, Rearrangement, load_noise_L, rearrange, slowest_s
from poise.plan.rebalance import Outcome, Planner, Proposal, Window
from poise.predict.drift import DriftRule, RoutingDrift, SpeedDrift

LEAST_WINDOWS = 4
"""Of a profile."""
FIRST_WINDOWS = 3
"""By which drift is noticed while a profile is learnt."""
MOST_WINDOWS = 16
"""Older ones are forgotten. So many are always enough to decide by."""
AFTER_WINDOWS = 4
"""That show what a change has brought."""
TRUSTED_LOAD_FRAC, TRUSTED_PACE_FRAC = 0.1, 0.05
"""Fewer are enough where ranks' loads, and their paces, are known within these shares."""
SURE = 2.5
"""Standard errors by which a gain must exceed what a change needs."""
ALIKE = 2.0
"""Windows are of one kind of work where their loads per pass lie within this factor."""
CAME_FRAC = 0.5
"""A change that brought less of what was predicted makes the next one harder, up to ``MOST_CAUTION`` times the gain."""
MOST_CAUTION = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Vibe:
    """``least_gain_frac``: how much shorter the slowest ranks' time must become. ``payback_steps``: passes within which an
    expert's move must pay for itself. ``routing``, ``speed``: what counts as drift."""

    interval: int = 8
    least_gain_frac: float = 0.03
    payback_steps: int = 512
    routing: DriftRule = field(default_factory=lambda: DriftRule(limit=0.02, noise_factor=3.0))
    speed: DriftRule = field(default_factory=lambda: DriftRule(limit=0.05, noise_factor=3.5))

    def start(self, curves: RankCosts | None) -> Planner:
        return VibePlanner(self, curves)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Change:
    """One that was proposed. ``seen``: costs it was made with; ``bias``: what was measured before it over what they say, and
    ``bias_error`` of that. ``after_W``: gains seen in windows behind it."""

    made: Rearrangement
    before_LS: Ints
    seen: Observed
    bias: float
    bias_error: float
    after_W: list[float]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Watch:
    """Against what drift is measured."""

    seen: Observed
    routing: RoutingDrift
    speed: SpeedDrift


class VibePlanner:
    """Takes windows one after the other. It learns a profile while a change is due, and watches for drift all the time."""

    def __init__(self, policy: Vibe, curves: RankCosts | None) -> None:
        self._policy = policy
        self._curves = curves
        self._loads: deque[Window] = deque(maxlen=MOST_WINDOWS)
        self._paces: deque[Window] = deque(maxlen=MOST_WINDOWS)
        self._due: str | None = "a first profile is there"
        self._watch: _Watch | None = None
        self._change: _Change | None = None
        self._awaited_LS: Ints | None = None
        self.caution = 1.0
        """How many times the usual gain a change needs: more where changes did not bring what was predicted."""
        self.outcomes: list[Outcome | None] = []

    def propose(self, window: Window) -> Proposal | None:
        """A placement that pays, if one is due."""
        if self._awaited_LS is not None and np.array_equal(window.current_LS, self._awaited_LS):
            self._awaited_LS = None
        if self._awaited_LS is not None or not window.load_LE.any():
            return None
        self._loads.append(window)
        if not window.is_settled:
            return None
        self._paces.append(window)
        self._look_back(window)
        drifted = None if self._watch is None else self._drift(self._watch, window)
        if drifted is not None:
            self._due, self._watch = drifted, None
        return None if self._due is None else self._rearranged(self._due)

    def _drift(self, watch: _Watch, window: Window) -> str | None:
        """Why a change is due; then only the windows since the drift count."""
        times = window.times
        routing = watch.routing.observe(window.load_LE)
        if routing.drifted:
            _keep_last(self._loads, self._policy.routing.windows)
            return f"routing has drifted from its profile (cosine distance {routing.distance:.2f})"
        if not times.worked_NR.any(axis=0).all():
            return None
        predicted_NR = watch.seen.costs.seconds_LR(times.tokens_NR, times.active_NR)
        speed = watch.speed.observe(predicted_NR, times.seconds_NR)
        if not speed.drifted:
            return None
        _keep_last(self._paces, self._policy.speed.windows)
        apart_R = speed.factor_R / (np.median(speed.factor_R) if window.num_ranks > 2 else 1.0)
        rank = int(np.argmax(np.abs(np.log(apart_R))))
        return f"rank {rank} computes at {apart_R[rank]:.2f} of its former speed"

    def _rearranged(self, reason: str) -> Proposal | None:
        """What to do about it, once that can be said; nothing where no change pays. From then on drift is watched."""
        _forget_other_work(self._loads)
        profile = Profile(loads=tuple(self._loads), paces=tuple(self._paces), curves=self._curves)
        fewest = min(len(profile.loads), len(profile.paces))
        seen = profile.seen() if fewest >= FIRST_WINDOWS else None
        if seen is None:
            return None
        self._watch = self._watch or self._watched(profile, seen)  # things may change while a profile is learnt
        if fewest < LEAST_WINDOWS:
            return None
        noise_L = load_noise_L(profile, seen)
        is_trusted = noise_L.mean() <= TRUSTED_LOAD_FRAC and seen.error_R.max() <= TRUSTED_PACE_FRAC
        if not is_trusted and fewest < MOST_WINDOWS:
            return None
        move_s = profile.paces[-1].move_s
        made = rearrange(profile, seen, noise_L=noise_L, least_gain_s=move_s / self._policy.payback_steps)
        needed, unsure = self.caution * self._policy.least_gain_frac, SURE * made.error_frac
        if made.gain_frac - unsure < needed < made.gain_frac + unsure and fewest < MOST_WINDOWS:
            return None  # more windows will tell
        self._due, self._change = None, None
        self._watch = self._watched(profile, seen)
        if made.gain_frac - unsure < needed or not made.moved:
            return None
        self._change = _changed(made, profile, seen)
        self._awaited_LS = made.slot_to_expert_LS
        self.outcomes.append(None)
        return Proposal(slot_to_expert_LS=made.slot_to_expert_LS, reason=reason, gain_frac=made.gain_frac)

    def _watched(self, profile: Profile, seen: Observed) -> _Watch:
        """Drift from this profile; its own windows show the noise of speeds."""
        speed = SpeedDrift(self._policy.speed)
        for window in profile.paces:
            times = window.times
            if times.worked_NR.any(axis=0).all():
                speed.observe(seen.costs.seconds_LR(times.tokens_NR, times.active_NR), times.seconds_NR)
        routing = RoutingDrift(np.stack([window.load_LE for window in profile.loads]), self._policy.routing)
        return _Watch(seen=seen, routing=routing, speed=speed)

    def _look_back(self, window: Window) -> None:
        """What the last change has brought, against what the old placement would have taken for this window's load."""
        change = self._change
        if change is None:
            return
        without_s = change.bias * slowest_s(window, change.before_LS, change.seen)
        change.after_W.append(1.0 - window.times.slowest_s(change.seen.costs) / without_s)
        if len(change.after_W) < AFTER_WINDOWS:
            return
        came, own_error = float(np.mean(change.after_W)), np.std(change.after_W, ddof=1) / np.sqrt(AFTER_WINDOWS)
        outcome = Outcome(gain_frac=came, error_frac=float(np.hypot(own_error, change.bias_error)))
        self.outcomes[-1], self._change = outcome, None
        if came + outcome.error_frac < CAME_FRAC * change.made.gain_frac:
            self.caution = min(MOST_CAUTION, 2.0 * self.caution)
        else:
            self.caution = max(1.0, self.caution / 2.0)


def _changed(made: Rearrangement, profile: Profile, seen: Observed) -> _Change:
    bias_W = [each.times.slowest_s(seen.costs) / slowest_s(each, each.current_LS, seen) for each in profile.paces]
    return _Change(
        made=made,
        before_LS=profile.current_LS,
        seen=seen,
        bias=float(np.mean(bias_W)),
        bias_error=float(np.std(bias_W, ddof=1) / np.sqrt(len(bias_W))),
        after_W=[],
    )


def _keep_last(windows: deque[Window], count: int) -> None:
    while len(windows) > count:
        windows.popleft()


def _forget_other_work(windows: deque[Window]) -> None:
    """Where the last windows are of one kind of work (decode, say), those before that are not tell nothing about it."""
    tokens_W = np.array([window.load_LE.sum() / window.runs for window in windows])
    last_W = tokens_W[-LEAST_WINDOWS:]
    if len(last_W) < LEAST_WINDOWS or last_W.max() > ALIKE * last_W.min():
        return
    usual = float(np.median(last_W))
    others = np.flatnonzero((tokens_W > ALIKE * usual) | (tokens_W < usual / ALIKE))
    if len(others):
        _keep_last(windows, len(windows) - 1 - int(others[-1]))
