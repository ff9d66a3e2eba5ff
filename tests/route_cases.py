"""Routes choice by choice, to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from poise.parallel.routes import Routes


def assert_follows(routes: Routes, choice_TK: torch.Tensor, rank_of: Callable[[int, int], int]) -> None:
    """The rows are those in which the i-th choice of an expert goes to ``rank_of(expert, i)``."""
    none, ranks = routes.num_experts, len(routes.sent_R)
    seen = [0] * none
    rows_R: list[dict[int, list[int]]] = [{} for _ in range(ranks)]
    for token, choices in enumerate(choice_TK.tolist()):
        for place, expert in enumerate(choices):
            if expert < none:
                row = rows_R[rank_of(expert, seen[expert])].setdefault(token, [none] * len(choices))
                row[place] = expert
                seen[expert] += 1
    assert routes.sent_R == tuple(map(len, rows_R))
    assert routes.token_N.tolist() == [token for rows in rows_R for token in rows]
    assert routes.experts_NK.tolist() == [row for rows in rows_R for row in rows.values()]
    pairs = [sum(expert < none for row in rows.values() for expert in row) for rows in rows_R]
    assert routes.pairs_R == tuple(pairs)
