"""When a figure is certain, and how cases take turns; with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from poise.profile.measure import Run, interval_rank, measure, summarise

UNSTEADY = (0.03, 0.01, 0.05, 0.01, 0.03, 0.05, 0.01, 0.05)
"""Seconds of two visits, a run that does not count before each: short as often as long."""


@dataclass
class Clock:
    """Stands still but for the runs."""

    now_s: float = 0.0
    order: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def run(self, name: str, times_s: Sequence[float]) -> Run:
        """A case that takes these times, over and over."""
        number = -1

        def run() -> tuple[float, ...]:
            nonlocal number
            number += 1
            time_s = times_s[number % len(times_s)]
            self.now_s += time_s
            self.order.append(name)
            return (time_s,)

        return run


def test_an_interval_needs_six_runs() -> None:
    assert [interval_rank(runs) for runs in (1, 5, 6, 8, 9, 12, 100)] == [0, 0, 1, 1, 2, 3, 40]


def test_a_summary_is_the_median_and_its_interval() -> None:
    nine = summarise([9.0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert (nine.seconds, nine.low_s, nine.high_s, nine.runs) == (5, 2, 8, 9)
    assert not nine.is_certain
    two = summarise([1.0, 1.0])
    assert (two.low_s, two.high_s) == (1, 1)
    assert not two.is_certain, "two runs say nothing about a third"
    assert summarise([1.0] * 6).is_certain


def test_a_steady_case_ends_after_two_visits_and_an_unsteady_one_goes_on() -> None:
    clock = Clock()
    cases = [clock.run("steady", [0.01]), clock.run("unsteady", UNSTEADY)]
    (steady,), (unsteady,) = measure(cases, cap_s=5.0, clock=clock)
    assert (steady.seconds, steady.runs) == (0.01, 6)
    assert steady.is_certain
    assert unsteady.runs > 90
    assert not unsteady.is_certain
    assert clock.now_s < 5.3
    visit = ["steady"] * 4 + ["unsteady"] * 4
    assert clock.order[:16] == visit * 2, "they take turns"


def test_the_first_run_of_a_visit_does_not_count() -> None:
    clock = Clock()
    ((time,),) = measure([clock.run("cold", [1.0, 0.02])], cap_s=100.0, clock=clock)
    assert time.seconds == 0.02


def test_every_case_is_run_when_the_time_is_up_at_once() -> None:
    clock = Clock()
    cases = [clock.run(name, [10.0]) for name in "abc"]
    measured = measure(cases, cap_s=1.0, clock=clock)
    assert [time.seconds for (time,) in measured] == [10, 10, 10]
    assert not any(time.is_certain for (time,) in measured)
    assert clock.order == ["a", "a", "b", "c"], "the later ones once"


def test_progress_never_falls_and_ends_at_one() -> None:
    clock = Clock()
    told: list[float] = []
    cases = [clock.run("steady", [0.01]), clock.run("unsteady", UNSTEADY)]
    measure(cases, cap_s=1.0, clock=clock, on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    assert max(told) == pytest.approx(1)
