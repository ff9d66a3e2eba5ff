"""Requests dealt out to ranks: each gets its share of the tokens. Pure; the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def deal(tokens: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """The requests of each rank, by index, ascending. ``tokens``: what each request will take, prompt and answer.

    The longest first, each to the rank with the fewest tokens so far, of those with the fewest requests.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        rank = min(range(num_ranks), key=lambda rank: (len(shares[rank]), loads[rank], rank))
        shares[rank].append(index)
        loads[rank] += tokens[index]
    return tuple(tuple(sorted(share)) for share in shares)
