"""Whole tokens: how many of each expert's each copy computes, and which of a rank's own tokens go where.

The tokens of one expert are taken in order: ranks where they are born, then as they lie there. A copy first takes those of its
own rank; what is left on all ranks goes, in this order, to what is left in the copies, in the order of their ranks. So every
rank knows the same thing without asking. Compiled. Letters: R ranks, E experts, N copies in use, C copies of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.plan.balance_state import NONE, Counts, Step
from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Ints


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assignment:
    """Copies in use, by expert and rank: ``rank_N[n]`` computes ``tokens_N[n]`` tokens of its expert. Those of expert e are at
    ``begin_E1[e]`` to ``begin_E1[e + 1] - 1``, at least one for each expert, be it without tokens."""

    begin_E1: Ints
    rank_N: Ints
    tokens_N: Ints

    @property
    def expert_N(self) -> Ints:
        return np.repeat(np.arange(len(self.begin_E1) - 1), np.diff(self.begin_E1))

    def tokens_ER(self, num_ranks: int) -> Ints:
        """Tokens of each expert that each rank computes."""
        tokens_ER = np.zeros((len(self.begin_E1) - 1, num_ranks), dtype=np.int64)
        tokens_ER[self.expert_N, self.rank_N] = self.tokens_N
        return tokens_ER


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dispatch:
    """Where the tokens of one rank go: its i-th (from 0) for expert e to ``rank_EC[e, c]`` of the first c with
    ``i < until_EC[e, c]``. Beyond an expert's copies its last is repeated."""

    rank_EC: Ints
    until_EC: Ints

    def tokens_ER(self, num_ranks: int) -> Ints:
        """How many tokens for each expert go to each rank."""
        tokens_EC = np.diff(self.until_EC, axis=1, prepend=0)
        tokens_ER = np.zeros((len(tokens_EC), num_ranks), dtype=np.int64)
        np.add.at(tokens_ER, (np.arange(len(tokens_EC))[:, None], self.rank_EC), tokens_EC)
        return tokens_ER


def dispatch_of(
    assignment: Assignment,
    counts_RE: npt.NDArray[np.integer],
    source: int,
    own_E: npt.NDArray[np.integer] | None = None,
) -> Dispatch:
    """Where the tokens of rank ``source`` go under an assignment that was made for ``counts_RE``.

    ``own_E``: its true tokens, where only predicted counts are known of all: they are dealt out in the same proportions.
    """
    all_RE: Counts = np.ascontiguousarray(counts_RE, dtype=np.int32)
    own: Counts = all_RE[source] if own_E is None else np.ascontiguousarray(own_E, dtype=np.int32)
    rank_EC, until_EC = _cuts(assignment.begin_E1, assignment.rank_N, assignment.tokens_N, all_RE, source, own)
    return Dispatch(rank_EC=rank_EC, until_EC=until_EC)


def tokens_to(assignment: Assignment, counts_RE: npt.NDArray[np.integer], target: int) -> Ints:
    """How many (token, expert) pairs go from each rank to rank ``target``, if all go as ``dispatch_of`` says."""
    all_RE: Counts = np.ascontiguousarray(counts_RE, dtype=np.int32)
    tokens_R: Ints = _tokens_to(assignment.begin_E1, assignment.rank_N, assignment.tokens_N, all_RE, target)
    return tokens_R


@compiled
def whole_tokens(step: Step) -> tuple[Ints, Ints, Ints]:
    """``begin_E1``, ``rank_N``, ``tokens_N`` of an ``Assignment``: quotas made whole, so that the sums stay."""
    num_experts = len(step.expert_E)
    begin_E1 = np.zeros(num_experts + 1, dtype=np.int64)
    rank_N = np.empty(len(step.copy_C), dtype=np.int64)
    tokens_N = np.empty(len(step.copy_C), dtype=np.int64)
    count = 0
    for expert in range(num_experts):
        its = step.expert_E[expert]
        begin, next_copy, below, given = count, its["first"], 0.0, 0
        if its["copies"] == 1:
            rank_N[count], tokens_N[count] = step.copy_C[next_copy]["rank"], int(its["total"])
            count, next_copy = count + 1, NONE
        while next_copy != NONE:
            copy = step.copy_C[next_copy]
            below += copy["quota"]
            until = int(below + 0.5)
            place, rank = count, copy["rank"]
            while place > begin and rank_N[place - 1] > rank:
                rank_N[place], tokens_N[place] = rank_N[place - 1], tokens_N[place - 1]
                place -= 1
            rank_N[place], tokens_N[place] = rank, until - given
            given, count, next_copy = until, count + 1, copy["next"]
        begin_E1[expert + 1] = count
    return begin_E1, rank_N[:count], tokens_N[:count]


@compiled
def _cuts(
    begin_E1: Ints, rank_N: Ints, tokens_N: Ints, counts_RE: Counts, source: int, own_E: Counts
) -> tuple[Ints, Ints]:
    num_experts, most = len(begin_E1) - 1, 1
    for expert in range(num_experts):
        most = max(most, begin_E1[expert + 1] - begin_E1[expert])
    rank_EC = np.empty((num_experts, most), dtype=np.int64)
    until_EC = np.empty((num_experts, most), dtype=np.int64)
    for expert in range(num_experts):
        begin, end = begin_E1[expert], begin_E1[expert + 1]
        own, counted = own_E[expert], counts_RE[source, expert]
        if end - begin == 1:
            rank_EC[expert], until_EC[expert] = rank_N[begin], own
            continue
        kept, first, last = _left_over(begin, end, rank_N, tokens_N, counts_RE, source, expert)
        until, filled = 0, 0
        for place in range(begin, end):
            rank = rank_N[place]
            local = min(tokens_N[place], counts_RE[rank, expert])
            room = tokens_N[place] - local
            until += max(0, min(filled + room, last) - max(filled, first)) + (kept if rank == source else 0)
            filled += room
            rank_EC[expert, place - begin] = rank
            until_EC[expert, place - begin] = until if own == counted else _scaled(until, own, counted)
        rank_EC[expert, end - begin :], until_EC[expert, end - begin :] = rank_N[end - 1], own
        if own > 0 and counted == 0:
            until_EC[expert] = own
    return rank_EC, until_EC


@compiled
def _tokens_to(begin_E1: Ints, rank_N: Ints, tokens_N: Ints, counts_RE: Counts, target: int) -> Ints:
    num_ranks, num_experts = counts_RE.shape
    tokens_R = np.zeros(num_ranks, dtype=np.int64)
    for expert in range(num_experts):
        begin, end = begin_E1[expert], begin_E1[expert + 1]
        filled = 0
        for place in range(begin, end):
            rank = rank_N[place]
            local = min(tokens_N[place], counts_RE[rank, expert])
            room = tokens_N[place] - local
            if rank == target:
                tokens_R[target] += local
                for source in range(num_ranks):
                    _, first, last = _left_over(begin, end, rank_N, tokens_N, counts_RE, source, expert)
                    tokens_R[source] += max(0, min(filled + room, last) - max(filled, first))
            filled += room
    return tokens_R


@borrowing
def _left_over(
    begin: int, end: int, rank_N: Ints, tokens_N: Ints, counts_RE: Counts, source: int, expert: int
) -> tuple[int, int, int]:
    """Of an expert's tokens on ``source``: how many stay, and the places of the others among all that do not stay."""
    kept, before = 0, 0
    for rank in range(source):
        before += counts_RE[rank, expert]
    for place in range(begin, end):
        stay = min(tokens_N[place], counts_RE[rank_N[place], expert])
        if rank_N[place] < source:
            before -= stay
        elif rank_N[place] == source:
            kept = stay
    return kept, before, before + counts_RE[source, expert] - kept


@borrowing
def _scaled(until: int, own: int, counted: int) -> int:
    return int(until * own / counted + 0.5) if counted > 0 else own
