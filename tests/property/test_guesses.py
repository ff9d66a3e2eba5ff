"""How good guesses were, in the paper's terms: hand-made cases, and what holds for any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.predict.guesses import Guesses, hits_in_layer, hits_in_passes
from poise.predict.hits import Hits

ALL = np.ones(6, dtype=bool)
COUNTS = np.array([0, 9, 4, 4, 1, 0])


def chosen(counts_E: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Tokens of one choice each that choose the experts so often."""
    return np.repeat(np.arange(len(counts_E)), counts_E)[:, None]


@pytest.mark.parametrize(
    ("named", "used", "hottest"),
    [
        ([1], 1, 1.0),  # the hottest
        ([4], 1, 0.0),  # used, not the hottest
        ([0], 0, 0.0),
        ([1, 2], 2, 1.5),  # experts 2 and 3 tie for the second place
        ([1, 2, 3], 3, 3.0),
        ([0, 1, 2, 3, 4, 5], 4, 4.0),  # nobody is hot whom no token chose
    ],
)
def test_used_and_hottest_by_hand(named: list[int], used: int, hottest: float) -> None:
    assert hits_in_layer(COUNTS, named, ALL) == Hits(named=len(named), used=used, hottest=hottest)


def test_the_hottest_are_sought_among_those_that_could_be_named() -> None:
    choice_E = np.array([True, False, False, False, True, True])
    assert hits_in_layer(COUNTS, [4], choice_E) == Hits(named=1, used=1, hottest=1.0)
    assert hits_in_layer(COUNTS, [4, 5], choice_E) == Hits(named=2, used=1, hottest=1.0)


@given(st.data())
def test_the_truly_hottest_are_right_and_all_guesses_together_get_what_there_is(data: st.DataObject) -> None:
    counts_E = np.array(data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=8)))
    named = data.draw(st.integers(1, len(counts_E)))
    best = np.argsort(-counts_E, kind="stable")[:named]
    found = hits_in_passes(counts_E[None], best[None])
    assert found.used == min(named, np.count_nonzero(counts_E))
    assert found.hottest <= found.used
    distinct_E = counts_E * 10 + np.arange(len(counts_E)) + 1
    best = np.argsort(-distinct_E)[:named]
    assert hits_in_passes(distinct_E[None], best[None]) == Hits(named=named, used=named, hottest=named)
    each = [hits_in_passes(counts_E[None], np.array([[expert]])) for expert in range(len(counts_E))]
    assert sum(one.hottest for one in each) == pytest.approx(1.0 if counts_E.any() else 0.0)


def test_guesses_are_judged_once_by_their_own_layer() -> None:
    guesses = Guesses()
    for key in ((1, 4), (1, 0), (0, 2), (1, 4)):
        guesses.add(key)
    guesses.enter(1, np.array([True, False, False, False, False, True]))
    assert guesses.judge(1, chosen([1, 9, 4, 4, 3, 2])) == Hits(named=2, used=2, hottest=1.0), "5 was hotter than 0"
    guesses.enter(1, ~ALL)
    assert guesses.judge(1, chosen([1] * 6)) == Hits()
    guesses.enter(0, ~ALL)
    assert guesses.judge(0, np.array([[6, 2], [6, 6]])) == Hits(named=1, used=1, hottest=1.0), "6 is masked"


def test_an_aborted_pass_judges_nothing_and_shares_of_nothing_are_none() -> None:
    guesses = Guesses()
    guesses.add((0, 1))
    guesses.forget()
    guesses.enter(0, ALL)
    assert guesses.judge(0, chosen([1] * 6)).used_frac is None
    assert Hits().hottest_frac is None
