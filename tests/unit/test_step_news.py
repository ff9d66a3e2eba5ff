"""What a rank tells is what all others hear, field by field."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel.step_news import RankNews, StepNews, told

MOST = 2**62


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[RankNews], np.ndarray, np.ndarray, np.ndarray]:
    """News, true and predicted counts and rows to other ranks, of every rank."""
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    names = [each.name for each in fields(RankNews) if each.name != "pays"]
    told_R = [
        RankNews(**{name: draw(st.integers(0, MOST)) for name in names}, pays=draw(st.booleans())) for _ in range(ranks)
    ]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return told_R, *(rng.integers(0, MOST, (ranks, width)) for width in (experts, experts, ranks))


@settings(deadline=None, max_examples=40)
@given(rows())
def test_all_ranks_hear_what_each_tells(made: tuple[list[RankNews], np.ndarray, np.ndarray, np.ndarray]) -> None:
    told_R, counts_RE, predicted_RE, rows_RR = made
    heard = StepNews.heard(
        np.stack([told(*each) for each in zip(told_R, counts_RE, predicted_RE, rows_RR, strict=True)])
    )
    np.testing.assert_array_equal(heard.counts_RE, counts_RE)
    np.testing.assert_array_equal(heard.predicted_RE, predicted_RE)
    np.testing.assert_array_equal(heard.rows_RR, rows_RR)
    for each in fields(RankNews):
        values = [asdict(news)[each.name] for news in told_R]
        assert heard.of(each.name).tolist() == values
        assert heard.is_same(each.name) == (len(set(values)) == 1)


def test_one_rank_that_differs_is_enough() -> None:
    nothing_E, nothing_R = np.zeros(4, dtype=np.int64), [0] * 3
    for odd in range(3):
        told_R = [RankNews(layer=1, arithmetic=9 if rank == odd else 8, plan=5) for rank in range(3)]
        heard = StepNews.heard(np.stack([told(each, nothing_E, nothing_E, nothing_R) for each in told_R]))
        assert not heard.is_same("arithmetic")
        assert heard.is_same("plan")
