"""Time of many experts on one device: T(tokens, active), the experts running one after the other.

The model: an expert takes u(m, e) for its m tokens when e are active, and tokens are spread evenly, so that
T(n, e) = e u(n / e, e). Were experts wholly independent, u would not depend on e; what is measured at several e holds what
a layer costs once (grouping tokens, summing up), which many experts share. u is linear in m between points, and linear in
log e between the measured e; outside of them the nearest e holds. A curve in closed form has one u for every e.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from poise.cost.curves import Floats, PointCurve, TokenCurve

SMALLEST_SHARE = 0.1
"""Of the base's time that a shifted curve keeps, so that noise makes no time vanish."""


class ExpertCurve:
    """T(tokens, active) from the time of one expert at each measured number of active ones."""

    def __init__(self, per_expert: Mapping[int, TokenCurve]) -> None:
        """``per_expert[e]``: seconds of one expert against its own tokens, when ``e`` are active."""
        assert per_expert, "a curve needs a point"
        self.active_A = tuple(sorted(per_expert))
        self._curves_A = tuple(per_expert[active] for active in self.active_A)
        self._log_A = np.log(np.array(self.active_A, dtype=float))

    @classmethod
    def from_points(cls, points: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> ExpertCurve:
        """From measured (tokens, seconds) of one expert at each number of active ones; the fewest active are the base.

        The others follow the base's shape, shifted by what was measured at their own points: by the nearest one's
        difference outside of them, linearly between. So a few points do where more experts are active.
        """
        fewest = min(points)
        base = PointCurve(*points[fewest])
        curves = {active: base if active == fewest else _shifted(base, *points[active]) for active in points}
        return cls(curves)

    def seconds(self, tokens: ArrayLike, active: ArrayLike = 1) -> Floats:
        """Time of ``tokens`` in all, spread evenly over ``active`` >= 1 experts; the two are broadcast."""
        active = np.asarray(active, dtype=float)
        each = np.asarray(tokens, dtype=float) / active
        if len(self._curves_A) == 1:
            return np.asarray(active * self._curves_A[0].seconds(each))
        place = np.interp(np.log(active), self._log_A, np.arange(len(self.active_A)))
        total = np.zeros(np.broadcast_shapes(each.shape, active.shape))
        for index, curve in enumerate(self._curves_A):
            weight = np.maximum(0.0, 1.0 - np.abs(place - index))
            if np.any(weight):
                total = total + weight * curve.seconds(each)
        return np.asarray(active * total)

    def of_tokens(self, tokens_E: ArrayLike) -> Floats:
        """Time of experts with these tokens each, along the last axis; those without tokens are not active."""
        tokens = np.asarray(tokens_E, dtype=float)
        active = np.maximum(1, np.count_nonzero(tokens, axis=-1, keepdims=True))
        return np.asarray((self.seconds(tokens * active, active) / active).sum(axis=-1))

    def at_active(self, active: float) -> TokenCurve:
        """The curve against all tokens for a fixed number of active experts: for inner loops and for the inverse."""
        place = float(np.interp(np.log(active), self._log_A, np.arange(len(self.active_A))))
        low, share = int(place), place - int(place)
        if not share:
            return self._curves_A[low].repeated(active)
        pair = self._curves_A[low : low + 2]
        knots = np.unique(np.concatenate([_knots(curve) for curve in pair]))
        knots = np.append(knots, 2.0 * knots[-1])  # behind it, both have the slope that they keep
        mixed = (1.0 - share) * pair[0].seconds(knots) + share * pair[1].seconds(knots)
        return PointCurve(knots * active, mixed * active)

    def tokens_within(self, seconds: ArrayLike, active: float = 1) -> Floats:
        """The most tokens that ``active`` experts compute in ``seconds``."""
        return self.at_active(active).tokens_within(seconds)

    def floor(self) -> TokenCurve:
        """Of one expert: e of these never take longer than e or more of the real ones do for the same tokens in all."""
        points = [curve for curve in self._curves_A if isinstance(curve, PointCurve)]
        return PointCurve.below(points) if points else self._curves_A[0]

    def best_rate(self, bonus: ArrayLike) -> Floats:
        """The most that ``(tokens + bonus * active) / seconds(tokens, active)`` is, whatever the tokens and active experts."""
        return np.asarray(np.max([curve.best_rate(bonus) for curve in self._curves_A], axis=0))


def _shifted(base: PointCurve, tokens_P: ArrayLike, seconds_P: ArrayLike) -> PointCurve:
    tokens, seconds = np.asarray(tokens_P, dtype=float), np.asarray(seconds_P, dtype=float)
    knots = np.union1d(base.points[0], tokens)
    shape = base.seconds(knots)
    shifted = shape + np.interp(knots, tokens, seconds - base.seconds(tokens))
    return PointCurve(knots, np.maximum(shifted, SMALLEST_SHARE * shape))


def _knots(curve: TokenCurve) -> Floats:
    assert isinstance(curve, PointCurve), "a closed form stands alone"
    return curve.points[0]
