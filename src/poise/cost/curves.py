"""Time against tokens on one device, and its inverse; arrays in, arrays out, fast enough for a planner's inner loop.

Both kinds of curve are monotone: no tokens take no time, one token more never takes less. ``tokens_within`` is the inverse
f^-1 that the bounds of placement sum up: the most tokens that end in time, 0 where not even one does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
LEVEL_FRAC = 1e-6
"""Points that rise by less than this lie level; noise of rounding must not decide how a curve goes on."""
FAR = 1e12
"""Curves of points go on in a straight line to this many times their last point: in effect without end."""


class TokenCurve(Protocol):
    """``max_tokens``: the largest number of tokens that was measured; None for a curve in closed form."""

    @property
    def max_tokens(self) -> float | None: ...

    def seconds(self, tokens: ArrayLike) -> Floats:
        """Time for ``tokens`` >= 0 (fractions allowed), of the same shape."""
        ...

    def tokens_within(self, seconds: ArrayLike) -> Floats:
        """The most tokens whose time is at most ``seconds``, of the same shape."""
        ...

    def repeated(self, count: float) -> TokenCurve:
        """The curve of ``count`` equal pieces of work one after the other, tokens spread evenly over them."""
        ...

    def best_rate(self, bonus: ArrayLike) -> Floats:
        """The most that ``(tokens + bonus) / seconds(tokens)`` is for any number of tokens; of the shape of ``bonus`` >= 0."""
        ...


class PointCurve:
    """Straight lines between measured points.

    Points that fall (noise) are pooled into the closest curve that does not: isotonic least squares. Below the first point
    time is that of the first; behind the last it grows as it did before it.
    """

    def __init__(self, tokens_P: ArrayLike, seconds_P: ArrayLike) -> None:
        """Tokens > 0, strictly ascending; seconds > 0."""
        tokens, seconds = np.asarray(tokens_P, dtype=float), np.asarray(seconds_P, dtype=float)
        assert tokens.size, "a curve needs a point"
        assert bool((np.diff(tokens, prepend=0.0) > 0).all()), "tokens are positive and ascending"
        assert bool((seconds > 0).all()), "seconds are positive"
        seconds = non_decreasing(seconds)
        lower = np.flatnonzero(seconds < seconds[-1] * (1.0 - LEVEL_FRAC))
        if lower.size:
            slope = (seconds[-1] - seconds[lower[-1]]) / (tokens[-1] - tokens[lower[-1]])
        else:
            slope = seconds[-1] / tokens[-1]
        far = tokens[-1] * FAR
        self._tokens_P = np.append(tokens, far)
        self._seconds_P = np.append(seconds, seconds[-1] + slope * (far - tokens[-1]))

    @property
    def max_tokens(self) -> float:
        return float(self._tokens_P[-2])

    @property
    def points(self) -> tuple[Floats, Floats]:
        """The points (tokens, seconds) after pooling."""
        return self._tokens_P[:-1], self._seconds_P[:-1]

    def seconds(self, tokens: ArrayLike) -> Floats:
        tokens = np.asarray(tokens, dtype=float)
        return np.where(tokens > 0, np.interp(tokens, self._tokens_P, self._seconds_P), 0.0)

    def tokens_within(self, seconds: ArrayLike) -> Floats:
        # Where the curve is level, np.interp takes the last of equal points: the most tokens, as it should be.
        seconds = np.asarray(seconds, dtype=float)
        found = np.interp(seconds, self._seconds_P, self._tokens_P)
        return np.where(seconds >= self._seconds_P[0], found, 0.0)

    def repeated(self, count: float) -> PointCurve:
        curve = copy.copy(self)
        curve._tokens_P, curve._seconds_P = self._tokens_P * count, self._seconds_P * count
        return curve

    @classmethod
    def below(cls, curves: Sequence[PointCurve]) -> PointCurve:
        """One that none of ``curves`` goes below, and whose time for each token never rises with the tokens."""
        knots_P = np.unique(np.concatenate([curve._tokens_P for curve in curves]))
        lowest_P = np.min([curve.seconds(knots_P) for curve in curves], axis=0)
        floor = copy.copy(curves[0])
        # Between knots both the least of lines and the least time for a token bend down: straight lines lie below them.
        floor._tokens_P, floor._seconds_P = knots_P, knots_P * np.minimum.accumulate(lowest_P / knots_P)
        return floor

    def best_rate(self, bonus: ArrayLike) -> Floats:
        # Between two points the ratio of two straight lines is monotone, so that one of the points has the most.
        bonus = np.asarray(bonus, dtype=float)
        at_points = (bonus[..., None] + self._tokens_P) / self._seconds_P
        return np.asarray(np.maximum(bonus / self._seconds_P[0], at_points.max(axis=-1)))


class ClosedFormCurve:
    """``T(n) = (a^p + (b n)^p)^(1/p)``: a roofline with a rounded knee. ``a_s`` is the fixed cost, ``b_s`` that of a token."""

    def __init__(self, a_s: float, b_s: float, p: float) -> None:
        assert a_s >= 0, "a is 0 or more"
        assert min(b_s, p) > 0, "b and p are positive"
        self.a_s, self.b_s, self.p = a_s, b_s, p

    @property
    def max_tokens(self) -> None:
        return None

    def seconds(self, tokens: ArrayLike) -> Floats:
        work = self.b_s * np.asarray(tokens, dtype=float)
        larger = np.maximum(work, self.a_s)
        ratio = np.minimum(work, self.a_s) / np.where(larger > 0, larger, 1.0)
        return np.where(work > 0, larger * (1.0 + ratio**self.p) ** (1.0 / self.p), 0.0)

    def tokens_within(self, seconds: ArrayLike) -> Floats:
        seconds = np.asarray(seconds, dtype=float)
        ratio = self.a_s / np.maximum(seconds, max(self.a_s, np.finfo(float).tiny))
        return np.where(seconds > self.a_s, seconds * (1.0 - ratio**self.p) ** (1.0 / self.p) / self.b_s, 0.0)

    def repeated(self, count: float) -> ClosedFormCurve:
        return ClosedFormCurve(self.a_s * count, self.b_s, self.p)

    def best_rate(self, bonus: ArrayLike) -> Floats:
        # Hoelder's inequality: b n / b + a bonus / a is at most T(n) times the dual norm of (1 / b, bonus / a).
        bonus = np.asarray(bonus, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            fixed = np.where(bonus > 0, bonus / self.a_s, 0.0)
        larger = np.maximum(fixed, 1.0 / self.b_s)
        if self.p <= 1.0:
            return larger
        dual = self.p / (self.p - 1.0)
        ratio = np.where(np.isinf(larger), 0.0, np.minimum(fixed, 1.0 / self.b_s) / larger)
        return np.asarray(larger * (1.0 + ratio**dual) ** (1.0 / dual))


def non_decreasing(values_P: Floats) -> Floats:
    """The non-decreasing sequence with the least squared distance from ``values_P`` (pool adjacent violators)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in values_P.tolist():
        mean, size = value, 1
        while means and means[-1] >= mean:
            earlier, count = means.pop(), sizes.pop()
            mean, size = (earlier * count + mean * size) / (count + size), count + size
        means.append(mean)
        sizes.append(size)
    return np.repeat(np.array(means), sizes)
