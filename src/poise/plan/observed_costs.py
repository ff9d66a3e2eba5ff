"""What experts cost on each rank, as it was observed, and how sure that is.

A layer of ``tokens`` (token, expert) pairs over ``active`` experts is taken to last ``active * a + tokens * b`` seconds: a is
what an expert's weights cost to touch, b what a pair costs. Where load is steady the two cannot be told apart on one rank, so
ranks lend each other their shape: each has the common line at a pace of its own, and departs from it as far as its times say
more than their scatter. Letters: N layers computed, R ranks, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.cost.curves import PointCurve
from poise.cost.experts import ExpertCurve
from poise.plan.rank_costs import Floats, RankCosts

HELD_UP = 3.0
"""A process that was held up has not become slow."""
USUAL_DEPARTURE = 0.25
"""How far a rank's two costs lie from the common line's, as a share of them, before anything is seen (standard deviation)."""
MOST_ROUNDS, ROUND_FRAC = 20, 2e-3
"""In which the common line and the ranks' paces are found in turn, until paces change by no more than this share."""
_MOST_TOKENS = 1 << 20
_LEAST_S = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedCost:
    """``expert_s``: of an active expert; ``token_s``: of a (token, expert) pair. Both 0 or more, not both 0."""

    expert_s: float
    token_s: float

    def seconds(self, tokens: npt.ArrayLike, active: npt.ArrayLike) -> Floats:
        """Of layers."""
        return np.asarray(active, dtype=float) * self.expert_s + np.asarray(tokens, dtype=float) * self.token_s

    def times(self, factor: float) -> ObservedCost:
        """So much slower."""
        return ObservedCost(expert_s=self.expert_s * factor, token_s=self.token_s * factor)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Times:
    """The layers that ranks computed in one window, one row for each; a rank without work in a row has zeros there."""

    tokens_NR: Floats
    active_NR: Floats
    seconds_NR: Floats

    @property
    def worked_NR(self) -> npt.NDArray[np.bool_]:
        """Where there was anything to compute."""
        return np.asarray((self.tokens_NR > 0) & (self.seconds_NR > 0))

    def slowest_s(self, costs: RankCosts | None = None) -> float:
        """What the ranks took together: the slowest one of each row. With ``costs`` a layer that was held up counts
        ``HELD_UP`` times what they say at most, so that a few do not hide all others."""
        if not len(self.seconds_NR):
            return 0.0
        seconds_NR = self.seconds_NR
        if costs is not None:
            seconds_NR = np.minimum(seconds_NR, HELD_UP * costs.seconds_LR(self.tokens_NR, self.active_NR))
        return float(seconds_NR.max(axis=1).sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Observed:
    """``scatter_R``: standard deviation of one layer's time, as a share of what ``costs`` say. ``error_R``: standard error of
    a rank's pace, from how windows differ; infinite where there are fewer than two."""

    costs: RankCosts
    scatter_R: Floats
    error_R: Floats


def observe(windows: Sequence[Times], curves: RankCosts | None = None) -> Observed | None:
    """Costs of all ranks from some windows; None where nobody computed anything.

    ``curves``: measured ones; ranks then have their shape, at the pace that was seen. A rank that was idle is taken to be
    like the mean of the others.
    """
    rows = _together(windows)
    if rows is None:
        return None
    costs = _costs(rows, curves)
    ratio_WR = np.stack([window_pace_R(each, costs) for each in windows])
    return Observed(costs=costs, scatter_R=_scatter_R(rows, costs), error_R=_error_R(ratio_WR))


def observed_costs(windows: Sequence[Times], curves: RankCosts | None = None) -> RankCosts | None:
    """The ``costs`` of ``observe`` alone, for two thirds of its time."""
    rows = _together(windows)
    return None if rows is None else _costs(rows, curves)


def _together(windows: Sequence[Times]) -> Times | None:
    """One after the other; None where nobody computed anything."""
    if not windows:
        return None
    tokens_NR, active_NR, seconds_NR = (
        np.concatenate([getattr(each, name) for each in windows]) for name in ("tokens_NR", "active_NR", "seconds_NR")
    )
    rows = Times(tokens_NR=tokens_NR, active_NR=active_NR, seconds_NR=seconds_NR)
    return rows if rows.worked_NR.any() else None


def _costs(rows: Times, curves: RankCosts | None) -> RankCosts:
    return _lines(rows) if curves is None else _paced(rows, curves)


def window_pace_R(times: Times, costs: RankCosts) -> Floats:
    """Seconds that each rank took in all over those that ``costs`` say, without layers held up; NaN for an idle rank."""
    predicted_NR = costs.seconds_LR(times.tokens_NR, times.active_NR)
    return _ratio_R(predicted_NR, times.seconds_NR, times.worked_NR)


def fit(
    tokens_N: npt.ArrayLike, active_N: npt.ArrayLike, seconds_N: npt.ArrayLike, *, like: ObservedCost | None = None
) -> ObservedCost | None:
    """The line through the layers, by least squares of errors relative to it, so that their sum is right; None where nothing
    was computed. ``like``: what it is held to as far as the times do not say otherwise.

    Layers that took more than ``HELD_UP`` times what the line says are left out.
    """
    tokens, active, seconds = (np.asarray(each, dtype=float) for each in (tokens_N, active_N, seconds_N))
    worked = (tokens > 0) & (seconds > 0)
    if not worked.any():
        return None
    tokens, active, seconds = tokens[worked], active[worked], seconds[worked]
    line = _line(tokens, active, seconds) if like is None else like
    for _ in range(2):
        ratio_N = seconds / line.seconds(tokens, active)
        usual = ratio_N <= HELD_UP * np.median(ratio_N)
        line = _nearer(
            line if like is None else like, tokens[usual], active[usual], seconds[usual], held=like is not None
        )
    return line


def rank_costs(observed_R: Sequence[ObservedCost | None]) -> RankCosts | None:
    """The ranks' curves; a rank that has computed nothing is taken to be like the mean of the others. None: nobody has."""
    known = [each for each in observed_R if each is not None]
    if not known:
        return None
    usual = ObservedCost(
        expert_s=float(np.mean([each.expert_s for each in known])),
        token_s=float(np.mean([each.token_s for each in known])),
    )
    return RankCosts.of_curves([_curve(each or usual) for each in observed_R])


def _lines(rows: Times) -> RankCosts:
    """A line for each rank: the common one at its pace, and its own departure from that. While these are sought paces are of
    each other: line and paces could else go on for ever, the one down as the others go up."""
    worked_NR = rows.worked_NR
    pace_R = relative_R = np.ones(worked_NR.shape[1])
    common = ObservedCost(expert_s=0.0, token_s=0.0)
    for _ in range(MOST_ROUNDS):
        scaled_NR = rows.seconds_NR / relative_R
        found = fit(rows.tokens_NR[worked_NR], rows.active_NR[worked_NR], scaled_NR[worked_NR])
        assert found is not None, "a rank has computed something"
        common = found
        found_R = _ratio_R(common.seconds(rows.tokens_NR, rows.active_NR), rows.seconds_NR, worked_NR)
        pace_R = np.where(np.isnan(found_R), np.nanmean(found_R), found_R)
        last_R, relative_R = relative_R, pace_R / pace_R.mean()
        if (np.abs(relative_R - last_R) < ROUND_FRAC * relative_R).all():
            break
    lines = [
        fit(rows.tokens_NR[:, rank], rows.active_NR[:, rank], rows.seconds_NR[:, rank], like=common.times(pace))
        for rank, pace in enumerate(pace_R.tolist())
    ]
    costs = rank_costs(lines)
    assert costs is not None, "a rank has computed something"
    return costs


def _paced(rows: Times, curves: RankCosts) -> RankCosts:
    """Measured curves at the pace that was seen."""
    pace_R = window_pace_R(rows, curves)
    pace_R = np.where(np.isnan(pace_R), np.nanmean(pace_R), pace_R)
    return replace(curves, speed_R=curves.speed_R / pace_R)


def _ratio_R(predicted_NR: Floats, seconds_NR: Floats, worked_NR: npt.NDArray[np.bool_]) -> Floats:
    """Of sums, over the rows in which a rank was not held up; NaN where it has none."""
    ratio_NR = np.where(worked_NR, seconds_NR / np.where(predicted_NR > 0, predicted_NR, 1.0), np.nan)
    busy_R = np.asarray(worked_NR.any(axis=0))
    limit_R = np.full(len(busy_R), np.nan)
    limit_R[busy_R] = HELD_UP * _median_R(ratio_NR[:, busy_R])
    usual_NR = worked_NR & (ratio_NR <= limit_R)
    predicted_R = np.where(usual_NR, predicted_NR, 0.0).sum(axis=0)
    measured_R = np.where(usual_NR, seconds_NR, 0.0).sum(axis=0)
    return np.where(predicted_R > 0, measured_R / np.where(predicted_R > 0, predicted_R, 1.0), np.nan)


def _median_R(ratio_NR: Floats) -> Floats:
    """Of each column, which has a number besides NaN. ``np.nanmedian`` does the same in five times the time."""
    sorted_NR = np.sort(ratio_NR, axis=0)
    known_R, columns = np.count_nonzero(~np.isnan(ratio_NR), axis=0), np.arange(ratio_NR.shape[1])
    return np.asarray((sorted_NR[(known_R - 1) // 2, columns] + sorted_NR[known_R // 2, columns]) / 2.0)


def _scatter_R(rows: Times, costs: RankCosts) -> Floats:
    predicted_NR = costs.seconds_LR(rows.tokens_NR, rows.active_NR)
    worked_NR = rows.worked_NR
    ratio_NR = np.where(worked_NR, rows.seconds_NR / np.where(predicted_NR > 0, predicted_NR, 1.0), 1.0)
    off_NR = np.where(ratio_NR <= HELD_UP, ratio_NR - 1.0, 0.0)
    return np.asarray(np.sqrt((off_NR**2).sum(axis=0) / np.maximum(worked_NR.sum(axis=0), 1)))


def _error_R(ratio_WR: Floats) -> Floats:
    known_R = np.count_nonzero(~np.isnan(ratio_WR), axis=0)
    error_R = np.full(ratio_WR.shape[1], np.inf)
    enough = known_R >= 2
    error_R[enough] = np.nanstd(ratio_WR[:, enough], axis=0, ddof=1) / np.sqrt(known_R[enough])
    return error_R


def _line(tokens_N: Floats, active_N: Floats, seconds_N: Floats) -> ObservedCost:
    """By least squares of errors relative to what was measured. Not negative: where one of the two would be, the other alone
    explains the times."""
    scaled_N2 = np.stack([active_N, tokens_N], axis=1) / seconds_N[:, None]
    found, *_ = np.linalg.lstsq(scaled_N2, np.ones(len(seconds_N)), rcond=None)
    if (found < 0).any() or not found.any():
        alone = [float(column.sum() / max((column**2).sum(), 1e-300)) for column in scaled_N2.T]
        errors = [float(((scaled_N2[:, index] * value - 1.0) ** 2).sum()) for index, value in enumerate(alone)]
        found = np.array([alone[0], 0.0] if errors[0] < errors[1] else [0.0, alone[1]])
    return ObservedCost(expert_s=float(found[0]), token_s=float(found[1]))


def _nearer(line: ObservedCost, tokens_N: Floats, active_N: Floats, seconds_N: Floats, *, held: bool) -> ObservedCost:
    """``line`` with both costs scaled so that errors, relative to it, are least; ``held``: and departures from it, too."""
    predicted_N = line.seconds(tokens_N, active_N)
    share_N2 = np.stack([active_N * line.expert_s, tokens_N * line.token_s], axis=1) / predicted_N[:, None]
    ratio_N = seconds_N / predicted_N
    keeps = float(np.var(ratio_N)) / USUAL_DEPARTURE**2 + 1e-9 if held else 1e-9
    square_22 = share_N2.T @ share_N2
    factor = np.linalg.solve(square_22 + keeps * np.eye(2), share_N2.T @ ratio_N + keeps)
    if (factor < 0).any():
        other = int(np.argmax(factor))
        factor = np.zeros(2)
        factor[other] = (share_N2[:, other] @ ratio_N + keeps) / (square_22[other, other] + keeps)
    return ObservedCost(expert_s=line.expert_s * float(factor[0]), token_s=line.token_s * float(factor[1]))


def _curve(cost: ObservedCost) -> ExpertCurve:
    token_s = max(cost.token_s, _LEAST_S)
    tokens = np.array([1.0, float(_MOST_TOKENS)])
    return ExpertCurve({1: PointCurve(tokens, cost.expert_s + token_s * tokens)})
