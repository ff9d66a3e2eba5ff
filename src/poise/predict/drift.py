"""Whether what a placement rests on still holds: where tokens go, and how fast the devices are.

``RoutingDrift`` compares the routing of each window with the profile, by cosine distance; ``SpeedDrift`` compares measured
times with the predicted ones. Both answer only when a limit above the noise is passed in several windows in a row, and then
not again before things were quiet. Source: ViBE (arXiv 2606.00735), recalibration. Pure but for counting windows.
Letters: L layers, E experts, W windows, N samples, R ranks, D devices.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.spec.machine import Machine

Floats = npt.NDArray[np.float64]

MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean, for normal noise."""
MAD_TO_SIGMA = 1.4826
NOISE_WINDOWS = 16
LEAST_STEPS = 3
"""Differences of windows that tell noise from a jump."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftRule:
    """``limit``: least value that counts as drift; ``noise_factor``: how far above the noise it must lie, too.

    ``windows``: so many in a row; ``quiet_frac``: below this share of the limit it is quiet again.
    """

    limit: float
    noise_factor: float
    windows: int = 3
    quiet_frac: float = 0.5

    def __post_init__(self) -> None:
        assert self.limit > 0, "a limit is above 0"
        assert self.noise_factor >= 1, "noise is no drift"
        assert self.windows >= 1, "drift takes at least a window"
        assert 0 <= self.quiet_frac <= 1, "quiet is below the limit"


ROUTING_RULE = DriftRule(limit=0.02, noise_factor=3.0)
"""Cosine distance."""
SPEED_RULE = DriftRule(limit=0.02, noise_factor=5.0)
"""Share of a device's speed, against the median device."""


class Hysteresis:
    """Says yes once when a value is over the limit ``windows`` times in a row; then not before it was quiet."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._in_a_row = 0
        self._armed = True

    def passed(self, value: float, limit: float) -> bool:
        """Takes one window's value."""
        if value < self._rule.quiet_frac * limit:
            self._armed = True
        self._in_a_row = self._in_a_row + 1 if value > limit else 0
        if not self._armed or self._in_a_row < self._rule.windows:
            return False
        self._armed, self._in_a_row = False, 0
        return True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingVerdict:
    """``distance``: mean over layers, 0 to 1; ``limit``: what it must pass. ``drifted``: profile and placement are due."""

    distance_L: Floats
    limit: float
    drifted: bool

    @property
    def distance(self) -> float:
        return float(self.distance_L.mean())


class RoutingDrift:
    """Watches windows of routing against a profile; make a new one for a new profile."""

    def __init__(self, profile_WLE: npt.ArrayLike, rule: DriftRule = ROUTING_RULE) -> None:
        """``profile_WLE``: tokens of each expert in the windows that the placement was made from.

        With two or more windows the noise is how far each lies from the others; with one it is what independent tokens
        would make, which real text exceeds.
        """
        profile = np.asarray(profile_WLE, dtype=float)
        assert profile.ndim == 3, "a profile is windows x layers x experts"
        self._profile_LE = profile.sum(axis=0)
        self._rule = rule
        self._hysteresis = Hysteresis(rule)
        self._noise = 0.0
        if len(profile) >= 2:
            self._noise = max(float(cosine_distance_L(one, self._profile_LE - one).mean()) for one in profile)

    def observe(self, tokens_LE: npt.ArrayLike) -> RoutingVerdict:
        """One window. A layer without tokens is not counted."""
        window_LE = np.asarray(tokens_LE, dtype=float)
        routed_L = window_LE.any(axis=1) & self._profile_LE.any(axis=1)
        if not routed_L.any():
            return RoutingVerdict(distance_L=np.zeros(len(window_LE)), limit=self._rule.limit, drifted=False)
        distance_L = cosine_distance_L(window_LE, self._profile_LE)
        noise = max(self._noise, float(sampling_distance_L(self._profile_LE, window_LE.sum(axis=1))[routed_L].mean()))
        limit = max(self._rule.limit, self._rule.noise_factor * noise)
        drifted = self._hysteresis.passed(float(distance_L[routed_L].mean()), limit)
        return RoutingVerdict(distance_L=distance_L, limit=limit, drifted=drifted)


def cosine_distance_L(one_LE: Floats, other_LE: Floats) -> Floats:
    """1 - cosine of the angle between the two, layer by layer; 0 where one of them is empty."""
    norms_L = np.linalg.norm(one_LE, axis=1) * np.linalg.norm(other_LE, axis=1)
    dots_L = (one_LE * other_LE).sum(axis=1)
    return np.where(norms_L > 0, np.maximum(0.0, 1.0 - dots_L / np.where(norms_L > 0, norms_L, 1.0)), 0.0)


def sampling_distance_L(profile_LE: Floats, tokens_L: Floats) -> Floats:
    """About the cosine distance that so many independent tokens have from the distribution they are drawn from.

    To second order 1 / (2 n |p|^2), for window and profile together.
    """
    total_L = np.maximum(profile_LE.sum(axis=1), 1.0)
    square_L = np.maximum(((profile_LE / total_L[:, None]) ** 2).sum(axis=1), 1.0 / profile_LE.shape[1])
    return np.asarray((1.0 / np.maximum(tokens_L, 1.0) + 1.0 / total_L) / (2.0 * square_L))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpeedVerdict:
    """``factor_R``: each rank's speed over what its curve says, median of the windows since things were quiet.

    ``drifted``: at least one rank has left the others' pace, and speeds are due.
    """

    factor_R: Floats
    drifted: bool


class SpeedDrift:
    """Watches measured times against predicted ones; make a new one once speeds are changed.

    A change that all ranks share moves no expert, so each rank is held against the median rank. Noise is how samples of a
    window scatter, or how windows in a row differ, if that is more: what slows a rank for a moment lasts for many samples.
    """

    def __init__(self, rule: DriftRule = SPEED_RULE) -> None:
        self._rule = rule
        self._hysteresis = Hysteresis(rule)
        self._recent: list[Floats] = []
        self._last_R: Floats | None = None
        self._steps: deque[Floats] = deque(maxlen=NOISE_WINDOWS)

    def observe(self, predicted_s_NR: npt.ArrayLike, measured_s_NR: npt.ArrayLike) -> SpeedVerdict:
        """One window: samples (steps, layers) of all ranks, those of a rank without work 0 in both."""
        predicted_NR, measured_NR = np.asarray(predicted_s_NR, dtype=float), np.asarray(measured_s_NR, dtype=float)
        assert predicted_NR.shape == measured_NR.shape, "each time is measured and predicted"
        worked_NR = (predicted_NR > 0) & (measured_NR > 0)
        assert worked_NR.any(axis=0).all(), "a rank has no sample in the window"
        ratio_NR = np.full(predicted_NR.shape, np.nan)
        np.log(predicted_NR / np.where(worked_NR, measured_NR, 1.0), out=ratio_NR, where=worked_NR)
        faster_R = np.nanmedian(ratio_NR, axis=0)
        spread_R = MAD_TO_SIGMA * np.nanmedian(np.abs(ratio_NR - faster_R), axis=0)
        noise_R = MEDIAN_ERROR * spread_R / np.sqrt(worked_NR.sum(axis=0))
        apart_R = np.abs(faster_R - np.median(faster_R))
        noise_R = np.maximum(noise_R, self._between_windows_R(faster_R - np.median(faster_R)))
        limit_R = np.maximum(self._rule.limit, self._rule.noise_factor * noise_R)
        self._recent = [*self._recent[-self._rule.windows + 1 :], faster_R] if self._rule.windows > 1 else [faster_R]
        drifted = self._hysteresis.passed(float((apart_R / limit_R).max()), 1.0)
        return SpeedVerdict(factor_R=np.exp(np.median(self._recent, axis=0)), drifted=drifted)

    def _between_windows_R(self, apart_R: Floats) -> Floats:
        """Noise of a window, from how windows in a row differ: a jump shows in one difference only, slow drift hardly."""
        if self._last_R is not None:
            self._steps.append(np.abs(apart_R - self._last_R))
        self._last_R = apart_R
        if len(self._steps) < LEAST_STEPS:
            return np.zeros_like(apart_R)
        return np.asarray(MAD_TO_SIGMA * np.median(self._steps, axis=0) / np.sqrt(2.0))


def recalibrated(machine: Machine, factor_D: npt.ArrayLike) -> Machine:
    """The machine with each device's speed times its factor. Ranks of a repeated device: give the median of theirs."""
    factors = np.asarray(factor_D, dtype=float)
    assert factors.shape == (len(machine.devices),), "a factor for each device"
    devices = zip(machine.devices, factors.tolist(), strict=True)
    return replace(machine, devices=tuple(replace(device, speed=device.speed * factor) for device, factor in devices))
