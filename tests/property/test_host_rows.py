"""Rows that came are closed up in place, as if they were picked and put together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel.host_rows import close_up


@settings(deadline=None)  # loops are compiled once
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_rows_are_closed_up_in_their_order_and_counted_by_rank(most_R: list[int], words: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    row_MB = rng.integers(0, 2**62, (sum(most_R), words))
    is_row_M = rng.random(len(row_MB)) < 0.6
    kept_MB, ends = row_MB[is_row_M], np.cumsum(most_R)
    came_R = close_up(row_MB, is_row_M, np.array(most_R))
    assert came_R.tolist() == [int(piece.sum()) for piece in np.split(is_row_M, ends[:-1])]
    np.testing.assert_array_equal(row_MB[: len(kept_MB)], kept_MB)
