"""What experts cost on each rank, as it was observed: a straight line per rank through the layers it has computed.

A layer of ``tokens`` (token, expert) pairs over ``active`` experts is taken to last ``active * a + tokens * b`` seconds: a is
what an expert's weights cost to touch, b what a pair costs. Letters: N layers computed, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.cost.curves import PointCurve
from poise.cost.experts import ExpertCurve
from poise.plan.rank_costs import Floats, RankCosts

HELD_UP = 3.0
"""A process that was held up has not become slow."""
_MOST_TOKENS = 1 << 20
_LEAST_S = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedCost:
    """``expert_s``: of an active expert; ``token_s``: of a (token, expert) pair. Both 0 or more, not both 0."""

    expert_s: float
    token_s: float

    def seconds(self, tokens: float, active: float) -> float:
        """Of a layer."""
        return active * self.expert_s + tokens * self.token_s


def fit(tokens_N: npt.ArrayLike, active_N: npt.ArrayLike, seconds_N: npt.ArrayLike) -> ObservedCost | None:
    """The line through the layers, by least squares of relative errors; None where nothing was computed.

    Layers that took more than ``HELD_UP`` times what the line says are left out of a second one.
    """
    tokens, active, seconds = (np.asarray(each, dtype=float) for each in (tokens_N, active_N, seconds_N))
    worked = (tokens > 0) & (seconds > 0)
    if not worked.any():
        return None
    tokens, active, seconds = tokens[worked], active[worked], seconds[worked]
    line = _line(tokens, active, seconds)
    usual = seconds <= HELD_UP * (line.expert_s * active + line.token_s * tokens)
    return _line(tokens[usual], active[usual], seconds[usual]) if usual.any() else line


def _line(tokens_N: Floats, active_N: Floats, seconds_N: Floats) -> ObservedCost:
    """Not negative: where one of the two would be, the other alone explains the times."""
    scaled_N2 = np.stack([active_N, tokens_N], axis=1) / seconds_N[:, None]
    found, *_ = np.linalg.lstsq(scaled_N2, np.ones(len(seconds_N)), rcond=None)
    if (found < 0).any() or not found.any():
        alone = [float(column.sum() / max((column**2).sum(), 1e-300)) for column in scaled_N2.T]
        errors = [float(((scaled_N2[:, index] * value - 1.0) ** 2).sum()) for index, value in enumerate(alone)]
        found = np.array([alone[0], 0.0] if errors[0] < errors[1] else [0.0, alone[1]])
    return ObservedCost(expert_s=float(found[0]), token_s=float(found[1]))


def rank_costs(observed_R: list[ObservedCost | None]) -> RankCosts | None:
    """The ranks' curves; a rank that has computed nothing is taken to be like the mean of the others. None: nobody has."""
    known = [each for each in observed_R if each is not None]
    if not known:
        return None
    usual = ObservedCost(
        expert_s=float(np.mean([each.expert_s for each in known])),
        token_s=float(np.mean([each.token_s for each in known])),
    )
    return RankCosts.of_curves([_curve(each or usual) for each in observed_R])


def _curve(cost: ObservedCost) -> ExpertCurve:
    token_s = max(cost.token_s, _LEAST_S)
    tokens = np.array([1.0, float(_MOST_TOKENS)])
    return ExpertCurve({1: PointCurve(tokens, cost.expert_s + token_s * tokens)})
