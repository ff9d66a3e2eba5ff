"""Loops over tokens and rows in host memory, compiled: the dozen operators that they take on tensors cost more than the work.

Numbers in, numbers out, of the shapes and dtypes that are said (C-contiguous); each one's first call takes long (``rehearse``).
Letters as in ``parallel.routes``; M places for rows that come, B eight-byte words of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.parallel.step_news import Ints
from poise.plan.compiled import compiled

Words = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Singles = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Experts = npt.NDArray[np.int16]
"""Of rows: a quarter of the bytes on their way to a GPU."""
Rows = tuple[Ints, Experts, Ints, Ints]
"""``token_N``, ``experts_NK``, ``sent_R`` and ``pairs_R`` of routes."""


@compiled
def rows_in_turn(choice_TK: Ints, rank_EC: Ints, count_E: Ints, first: int, num_ranks: int) -> Rows:
    """The i-th choice of an expert goes to its copy ``first + i``, modulo its copies. E or more: no choice."""
    tokens, top_k = choice_TK.shape
    rank_TK = np.empty((tokens, top_k), dtype=np.int64)
    copy_E = first % count_E
    for token in range(tokens):
        for k in range(top_k):
            expert = choice_TK[token, k]
            rank_TK[token, k] = num_ranks
            if expert < len(count_E):
                copy = copy_E[expert]
                rank_TK[token, k] = rank_EC[expert, copy]
                copy_E[expert] = copy + 1 if copy + 1 < count_E[expert] else 0
    return _rows(choice_TK, rank_TK, len(count_E), num_ranks)


@compiled
def rows_by_cuts(choice_TK: Ints, rank_EC: Ints, until_EC: Ints, num_ranks: int) -> Rows:
    """The i-th choice of an expert goes to the first of its copies with ``i < until``, or to the last. E or more: no choice."""
    tokens, top_k = choice_TK.shape
    experts, last = len(rank_EC), rank_EC.shape[1] - 1
    rank_TK = np.empty((tokens, top_k), dtype=np.int64)
    seen_E, copy_E = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    for token in range(tokens):
        for k in range(top_k):
            expert = choice_TK[token, k]
            rank_TK[token, k] = num_ranks
            if expert < experts:
                while copy_E[expert] < last and seen_E[expert] >= until_EC[expert, copy_E[expert]]:
                    copy_E[expert] += 1
                rank_TK[token, k] = rank_EC[expert, copy_E[expert]]
                seen_E[expert] += 1
    return _rows(choice_TK, rank_TK, experts, num_ranks)


@compiled
def _rows(choice_TK: Ints, rank_TK: Ints, num_experts: int, num_ranks: int) -> Rows:
    """A row for each rank that a token goes to, rank by rank. ``rank_TK``: ``num_ranks`` for none.

    Those have rows, too, behind all others, and every choice writes its token anew: whether a row is the first of its token is
    seldom foreseen, and a branch on it would take longer than the rest.
    """
    tokens, top_k = choice_TK.shape
    sent_R1, pairs_R1 = np.zeros(num_ranks + 1, dtype=np.int64), np.zeros(num_ranks + 1, dtype=np.int64)
    last_R1 = np.full(num_ranks + 1, -1, dtype=np.int64)  # the last token that went there
    for token in range(tokens):
        for k in range(top_k):
            rank = rank_TK[token, k]
            sent_R1[rank] += last_R1[rank] != token
            last_R1[rank] = token
            pairs_R1[rank] += 1
    at_R1 = np.cumsum(sent_R1) - sent_R1 - 1
    token_N = np.empty(sent_R1.sum(), dtype=np.int64)
    experts_NK = np.full((len(token_N), top_k), num_experts, dtype=np.int16)
    last_R1[:] = -1
    for token in range(tokens):
        for k in range(top_k):
            rank = rank_TK[token, k]
            row = at_R1[rank] + (last_R1[rank] != token)
            at_R1[rank] = row
            last_R1[rank] = token
            token_N[row] = token
            experts_NK[row, k] = choice_TK[token, k]
    rows = len(token_N) - sent_R1[num_ranks]
    return token_N[:rows], experts_NK[:rows], sent_R1[:num_ranks], pairs_R1[:num_ranks]


@compiled
def close_up(row_MB: Ints, is_row_M: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], most_R: Ints) -> Ints:
    """Moves rows up to where places before them are empty, and returns how many there are of each rank's ``most_R`` places."""
    came_R = np.zeros(len(most_R), dtype=np.int64)
    place, end = 0, 0
    for rank in range(len(most_R)):
        begin, end = end, end + most_R[rank]
        for row in range(begin, end):
            if is_row_M[row]:
                if place < row:
                    row_MB[place] = row_MB[row]
                place += 1
                came_R[rank] += 1
    return came_R


@compiled
def fill_rows(
    row_NW: Words, row_NF: Singles, token_N: Ints, experts_NK: Experts, weights_TK: Singles, hidden_TV: Words
) -> None:
    """Each row: experts, their weights, the token's hidden state (V words). ``row_NW`` and ``row_NF`` are the same memory."""
    top_k = experts_NK.shape[1]
    for row in range(len(token_N)):
        token = token_N[row]
        for k in range(top_k):
            row_NW[row, k] = experts_NK[row, k]
            row_NF[row, top_k + k] = weights_TK[token, k]
        for word in range(hidden_TV.shape[1]):
            row_NW[row, 2 * top_k + word] = hidden_TV[token, word]


@compiled
def add_rows(output_TH: Singles, token_N: Ints, row_NH: Singles) -> None:
    """Adds each row to its token's, in the order of rows."""
    for row in range(len(token_N)):
        token = token_N[row]
        for column in range(row_NH.shape[1]):
            output_TH[token, column] += row_NH[row, column]


def rehearse() -> None:
    """Compiles all of it, which takes long the first time on a machine."""
    choice_TK, one_EC, one_E = (
        np.zeros((1, 1), dtype=np.int64),
        np.zeros((1, 1), dtype=np.int64),
        np.ones(1, dtype=np.int64),
    )
    rows_in_turn(choice_TK, one_EC, one_E, 0, 1)
    rows_by_cuts(choice_TK, one_EC, one_EC, 1)
    words, singles = np.zeros((1, 3), dtype=np.int32), np.zeros((1, 3), dtype=np.float32)
    fill_rows(words, singles, np.zeros(1, dtype=np.int64), choice_TK.astype(np.int16), singles, words[:, :1].copy())
    add_rows(singles, np.zeros(1, dtype=np.int64), singles)
    close_up(one_EC, np.ones(1, dtype=np.bool_), one_E)
