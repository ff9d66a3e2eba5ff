"""Rows are filled, closed up and added up as tensors would be indexed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel.host_rows import add_rows, close_up, fill_rows


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


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_rows_are_filled_by_token_and_added_up_by_token(
    tokens: int, rows: int, top_k: int, hidden: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    token_N, experts_NK = rng.integers(0, tokens, rows), rng.integers(0, 9, (rows, top_k))
    weights_TK = rng.random((tokens, top_k)).astype(np.float32)
    hidden_TH = rng.normal(size=(tokens, hidden)).astype(np.float32)
    row_NF = np.zeros((rows, 2 * top_k + hidden), dtype=np.float32)
    fill_rows(row_NF.view(np.int32), row_NF, token_N, experts_NK, weights_TK, hidden_TH.view(np.int32))
    np.testing.assert_array_equal(row_NF[:, :top_k].view(np.int32), experts_NK)
    np.testing.assert_array_equal(row_NF[:, top_k:], np.hstack([weights_TK[token_N], hidden_TH[token_N]]))
    output_TH, expected_TH = np.zeros((tokens, hidden), dtype=np.float32), np.zeros((tokens, hidden), dtype=np.float32)
    add_rows(output_TH, token_N, hidden_TH[token_N])
    np.add.at(expected_TH, token_N, hidden_TH[token_N])
    np.testing.assert_array_equal(output_TH, expected_TH)
