"""Where the tokens of one rank go: which rows travel to which rank, each at most once, and which of their experts are there.

Tensors in, tensors out; no communication. Letters: T tokens of this rank, K choices of a token, E experts, C copies of an
expert, R ranks, N rows on their way (a token that goes to two ranks has two).
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
    """The ranks that have an expert: ``rank_EC`` (int64), ``count_E`` of which are meant. One layer's."""

    rank_EC: torch.Tensor
    count_E: torch.Tensor
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
            rank_EC=torch.tensor([(row * most)[:most] for row in ranks]),
            count_E=torch.tensor([len(row) for row in ranks]),
            num_ranks=num_ranks,
        )

    @property
    def has_replicas(self) -> bool:
        """Whether any expert lies on more than one rank."""
        return self.rank_EC.shape[1] > 1

    def to(self, device: torch.device) -> Copies:
        """The same on a device."""
        return Copies(rank_EC=self.rank_EC.to(device), count_E=self.count_E.to(device), num_ranks=self.num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routes:
    """Rows for rank 0, then for rank 1, ...: row n is token ``token_N[n]`` (ascending within a rank), ``sent_R`` per rank.

    ``experts_NK`` (int64): the choices that the receiver computes; E for those that others do, or nobody (padding).
    """

    token_N: torch.Tensor
    sent_R: tuple[int, ...]
    experts_NK: torch.Tensor
    num_experts: int


def route(choice_TK: torch.Tensor, copies: Copies, *, source_rank: int, on_host: bool | None = None) -> Routes:
    """The routes of tokens whose choices are ``choice_TK`` (int64; E or more: none).

    A rank's tokens for an expert are dealt out to its copies in turn, evenly as the planners assume; different ranks begin
    with different copies. ``on_host``: by compiled loops, for tensors in host memory; None: where they are.
    """
    num_experts = len(copies.count_E)
    if choice_TK.device.type == "cpu" if on_host is None else on_host:
        of_copies = copies.rank_EC.numpy(), copies.count_E.numpy()
        return _made(rows_in_turn(_host(choice_TK), *of_copies, source_rank, copies.num_ranks), num_experts)
    choice_TK = choice_TK.clamp(max=num_experts)
    expert_TK = choice_TK.clamp(max=num_experts - 1)
    if copies.has_replicas:
        turn_TK = _ordinals(choice_TK, num_experts) + source_rank
        rank_TK = copies.rank_EC[expert_TK, turn_TK % copies.count_E[expert_TK]]
    else:
        rank_TK = copies.rank_EC[expert_TK, 0]
    return _to_ranks(choice_TK, rank_TK, num_experts=num_experts, num_ranks=copies.num_ranks)


def route_by(choice_TK: torch.Tensor, dispatch: Dispatch, *, num_ranks: int, on_host: bool | None = None) -> Routes:
    """The same for a step that was balanced: a rank's i-th token for an expert goes where ``dispatch`` says."""
    num_experts = len(dispatch.rank_EC)
    if choice_TK.device.type == "cpu" if on_host is None else on_host:
        return _made(rows_by_cuts(_host(choice_TK), dispatch.rank_EC, dispatch.until_EC, num_ranks), num_experts)
    choice_TK = choice_TK.clamp(max=num_experts)
    expert_TK = choice_TK.clamp(max=num_experts - 1)
    rank_EC = torch.from_numpy(dispatch.rank_EC).to(choice_TK.device)
    if rank_EC.shape[1] > 1:
        until_EC = torch.from_numpy(dispatch.until_EC).to(choice_TK.device)
        turn_TK = _ordinals(choice_TK, num_experts)
        copy_TK = (turn_TK[..., None] >= until_EC[expert_TK]).sum(dim=-1).clamp(max=rank_EC.shape[1] - 1)
        rank_TK = rank_EC[expert_TK, copy_TK]
    else:
        rank_TK = rank_EC[expert_TK, 0]
    return _to_ranks(choice_TK, rank_TK, num_experts=num_experts, num_ranks=num_ranks)


def _host(choice_TK: torch.Tensor) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(choice_TK.numpy())


def _made(rows: Rows, num_experts: int) -> Routes:
    token_N, experts_NK, sent_R = rows
    return Routes(
        token_N=torch.from_numpy(token_N),
        sent_R=tuple(sent_R.tolist()),
        experts_NK=torch.from_numpy(experts_NK),
        num_experts=num_experts,
    )


def _to_ranks(choice_TK: torch.Tensor, rank_TK: torch.Tensor, *, num_experts: int, num_ranks: int) -> Routes:
    """Rows for choices (E: none) that ``rank_TK`` computes."""
    rank_TK = torch.where(choice_TK < num_experts, rank_TK, num_ranks)
    goes_TR = torch.zeros(len(choice_TK), num_ranks + 1, dtype=torch.bool, device=choice_TK.device)
    goes_TR.scatter_(1, rank_TK, torch.ones_like(rank_TK, dtype=torch.bool))
    goes_RT = goes_TR[:, :num_ranks].t()
    rank_N, token_N = goes_RT.nonzero(as_tuple=True)
    experts_NK = torch.where(rank_TK[token_N] == rank_N[:, None], choice_TK[token_N], num_experts)
    return Routes(
        token_N=token_N, sent_R=tuple(goes_RT.sum(dim=1).tolist()), experts_NK=experts_NK, num_experts=num_experts
    )


def _ordinals(choice_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many earlier choices are of the same expert, shape (T, K)."""
    flat_P = choice_TK.reshape(-1)
    order_P = flat_P.argsort(stable=True)
    counts_E = torch.bincount(flat_P, minlength=num_experts + 1)
    begin_E = counts_E.cumsum(0) - counts_E
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device) - begin_E[flat_P[order_P]]
    return place_P.view(choice_TK.shape)
