"""Timing until the figure is certain: medians of runs that take turns, with a confidence interval.

The criterion: the 95 % interval of the median (order statistics of the sign test: no assumption about the noise) lies within
5 % of the median on either side. Cases take turns in rounds, so that a passing disturbance of the machine hits every one
alike; those that are certain drop out. A cap on the time ends the rest: their measurement then says that it is not certain.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CERTAIN_FRAC = 0.05
MISSED_FRAC = 0.05
"""How often the true median may lie outside of the interval."""
RUNS_PER_VISIT = 3
SHORT_S = 0.1
"""Runs longer than this are done once a visit."""

Run = Callable[[], tuple[float, ...]]
"""One run of a case: seconds of each quantity that it measures."""
Clock = Callable[[], float]
OnProgress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Median of ``runs`` runs in seconds, and its 95 % interval (the extremes where there are too few runs for one)."""

    seconds: float
    low_s: float
    high_s: float
    runs: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval is one, and within ``CERTAIN_FRAC`` of the median."""
        margin = CERTAIN_FRAC * self.seconds
        return interval_rank(self.runs) > 0 and max(self.high_s - self.seconds, self.seconds - self.low_s) <= margin


def interval_rank(runs: int) -> int:
    """The interval reaches from the k-th smallest run to the k-th largest; 0 where no such interval is 95 % certain."""
    rank, below = 0, 0.0
    while rank < runs:
        below += math.comb(runs, rank) / 2**runs
        if 2 * below > MISSED_FRAC:
            break
        rank += 1
    return rank


def summarise(samples_s: Sequence[float]) -> Measurement:
    """The median of the samples and its interval. At least one sample."""
    ordered = sorted(samples_s)
    rank = max(1, interval_rank(len(ordered)))
    return Measurement(
        seconds=statistics.median(ordered), low_s=ordered[rank - 1], high_s=ordered[-rank], runs=len(ordered)
    )


def measure(
    cases: Sequence[Run],
    *,
    cap_s: float,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = lambda share: None,
) -> list[tuple[Measurement, ...]]:
    """The measurements of every case, in order: one for each quantity that its runs return.

    Each visit to a case begins with a run that does not count (caches, compiled kernels). Every case is run at least once,
    also when the cap of ``cap_s`` seconds has passed; then that first run counts.
    """
    samples: list[list[tuple[float, ...]]] = [[] for _ in cases]
    begin = clock()
    left = list(range(len(cases)))
    first = True
    while left and (first or clock() - begin < cap_s):
        for place, case in enumerate(left):
            if first or clock() - begin < cap_s:
                samples[case] += _visit(cases[case], clock, is_late=clock() - begin >= cap_s)
            done = (place + 1) / len(left) if first else 1.0 + min(1.0, (clock() - begin) / cap_s)
            on_progress(done / 2)
        first = False
        left = [case for case in left if not all(each.is_certain for each in _summaries(samples[case]))]
    on_progress(1.0)
    return [_summaries(runs) for runs in samples]


def _visit(run: Run, clock: Clock, *, is_late: bool) -> list[tuple[float, ...]]:
    begin = clock()
    warm_up = run()
    if is_late:
        return [warm_up]
    return [run() for _ in range(1 if clock() - begin > SHORT_S else RUNS_PER_VISIT)]


def _summaries(runs: Sequence[tuple[float, ...]]) -> tuple[Measurement, ...]:
    return tuple(summarise(quantity) for quantity in zip(*runs, strict=True))
