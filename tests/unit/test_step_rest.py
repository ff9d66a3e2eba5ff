"""Balancing rests where it costs more than it brings, longer each time, and is tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from poise.plan.step_rest import RestRule, StepRest

RULE = RestRule(trial_passes=2, rest_passes=3, most_rest_passes=7, margin=1.5)


def balanced(rest: StepRest, passes: int, *, tokens: int = 16, saved_s: float | None, spent_s: float = 1.0) -> str:
    """Which of so many passes were balanced."""
    seen = ""
    for _ in range(passes):
        is_on = rest.begin(tokens)
        rest.saw(saved_s, spent_s)
        seen += "x" if is_on else "."
    return seen


def test_what_pays_goes_on() -> None:
    assert balanced(StepRest(RULE), 20, saved_s=1.6) == 20 * "x"


def test_what_does_not_pay_rests_for_twice_as_long_each_time_up_to_a_limit() -> None:
    assert (
        balanced(StepRest(RULE), 28, saved_s=1.4) == "xx" + "..." + "xx" + "......" + "xx" + "......." + "xx" + "...."
    )


def test_once_it_pays_again_it_goes_on_and_rests_are_short_again() -> None:
    rest = StepRest(RULE)
    assert balanced(rest, 7, saved_s=0.0) == "xx...xx"
    assert balanced(rest, 6, saved_s=9.0) == "......"
    assert balanced(rest, 4, saved_s=9.0) == "xxxx"
    assert balanced(rest, 6, saved_s=0.0) == "xx...x"


def test_passes_of_another_size_are_judged_by_themselves() -> None:
    rest = StepRest(RULE)
    assert balanced(rest, 3, tokens=16, saved_s=0.0) == "xx."
    assert balanced(rest, 3, tokens=1024, saved_s=9.0) == "xxx"
    assert balanced(rest, 3, tokens=17, saved_s=0.0) == "..x"


def test_nothing_is_judged_before_costs_are_known() -> None:
    rest = StepRest(RULE)
    assert balanced(rest, 5, saved_s=None) == "xxxxx"
    assert balanced(rest, 3, saved_s=0.0) == "xx."


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 2), st.floats(0, 2)), max_size=200))
def test_no_rest_is_longer_than_the_limit(passes: list[tuple[int, float, float]]) -> None:
    rest = StepRest(RULE)
    since: dict[int, int] = {}
    for tokens, saved_s, spent_s in passes:
        kind = tokens.bit_length() // 2
        since[kind] = 0 if rest.begin(tokens) else since.get(kind, 0) + 1
        assert since[kind] <= RULE.most_rest_passes
        rest.saw(saved_s, spent_s)
