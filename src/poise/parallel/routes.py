"""Where the tokens of one rank go: which rows travel to which rank, each at most once, and which of their experts are there.

Tensors in, tensors out; no communication. Found on the host, which has to know how many rows go where: a compiled loop takes
less time than launching the few dozen operators that a GPU would need. Letters: T tokens of this rank, K choices of a token,
E experts, C copies of an expert, R ranks, N rows on their way (a token that goes to two ranks has two).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from poise.parallel.host_rows import Rows, rows_by_cuts, rows_in_turn
from poise.plan.balance_assignment import Dispatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Copies:
    """The ranks that have an expert: ``rank_EC``, ``count_E`` of which are meant. One layer's."""

    rank_EC: npt.NDArray[np.int64]
    count_E: npt.NDArray[np.int64]
    num_ranks: int

    @classmethod
    def of(cls, slot_to_expert_S: npt.NDArray[np.integer], *, num_experts: int, num_ranks: int) -> Copies:
        """The copies that a placement's row makes; two on one rank are one."""
        per_rank = len(slot_to_expert_S) // num_ranks
        ranks = [
            sorted({int(slot) // per_rank for slot in np.flatnonzero(slot_to_expert_S == expert)})
            for expert in range(num_experts)
        ]
        assert all(ranks), "every expert has a copy"
        most = max(map(len, ranks))
        return cls(
            rank_EC=np.array([(row * most)[:most] for row in ranks], dtype=np.int64),
            count_E=np.array([len(row) for row in ranks], dtype=np.int64),
            num_ranks=num_ranks,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routes:
    """Rows for rank 0, then for rank 1, ...: row n is token ``token_N[n]`` (ascending within a rank), ``sent_R`` per rank.

    ``experts_NK`` (int16): the choices that the receiver computes, ``pairs_R`` in all of its rows; E for those that others
    do, or nobody (padding).
    """

    token_N: torch.Tensor
    sent_R: tuple[int, ...]
    pairs_R: tuple[int, ...]
    experts_NK: torch.Tensor
    num_experts: int


def route(choice_TK: torch.Tensor, copies: Copies, *, source_rank: int, device: torch.device | None = None) -> Routes:
    """The routes of tokens whose choices are ``choice_TK`` (int64; E or more: none), on ``device``; None: where choices are.

    A rank's tokens for an expert are dealt out to its copies in turn, evenly as the planners assume; different ranks begin
    with different copies.
    """
    rows = rows_in_turn(_host(choice_TK), copies.rank_EC, copies.count_E, source_rank, copies.num_ranks)
    return _made(rows, len(copies.count_E), device or choice_TK.device)


def route_by(
    choice_TK: torch.Tensor, dispatch: Dispatch, *, num_ranks: int, device: torch.device | None = None
) -> Routes:
    """The same for a step that was balanced: a rank's i-th token for an expert goes where ``dispatch`` says."""
    rows = rows_by_cuts(_host(choice_TK), dispatch.rank_EC, dispatch.until_EC, num_ranks)
    return _made(rows, len(dispatch.rank_EC), device or choice_TK.device)


def _host(choice_TK: torch.Tensor) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(choice_TK.numpy(force=True))


def _made(rows: Rows, num_experts: int, device: torch.device) -> Routes:
    token_N, experts_NK, sent_R, pairs_R = rows
    assert num_experts <= np.iinfo(experts_NK.dtype).max, f"{num_experts} experts"
    return Routes(
        token_N=torch.from_numpy(token_N).to(device),
        sent_R=tuple(sent_R.tolist()),
        pairs_R=tuple(pairs_R.tolist()),
        experts_NK=torch.from_numpy(experts_NK).to(device),
        num_experts=num_experts,
    )
