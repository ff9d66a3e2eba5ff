"""Tokens to the ranks that have their experts, and the experts' outputs back: one all-to-all there, one back.

A message is a row of bytes: hidden state, the experts wanted of the receiver, their routing weights. How many rows come is
told first, with what ranks must agree on at each layer: where they are, and that nobody gives up; but not where all know
it, or a bound of it, from what they told before (``Coming``). Letters as in ``parallel.routes``; H hidden, M rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from poise.parallel.group import RankGroup
from poise.parallel.host_rows import add_rows, close_up, fill_rows
from poise.parallel.learning import Learning
from poise.parallel.routes import Routes

NO_ROW = -1
"""In place of a row's first expert: nothing has come."""


class Aside(Protocol):
    """Who uses the link while tokens do not: is told when it is needed, and when it is free."""

    def rows_leave(self) -> None: ...

    def plan_next(self) -> None:
        """While rows travel."""

    def rows_came(self) -> None: ...

    def outputs_leave(self) -> None: ...

    def outputs_came(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Coming:
    """Rows that come from each rank, or, where not ``is_exact``, the most that may; exactly, in either case, from itself."""

    rows_R: tuple[int, ...]
    is_exact: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Received:
    """Rows from rank 0, then from rank 1, ...: ``received_R`` of each. ``experts_MK`` int64, E for "not yours".

    ``routes``: on which this rank's own tokens went.
    ``waited_s``: from the own arrival to that of the last rank; ``rows_s``: from then until the rows were there. ``nbytes``: of
    rows sent to other ranks.
    """

    hidden_MH: torch.Tensor
    experts_MK: torch.Tensor
    weights_MK: torch.Tensor
    received_R: tuple[int, ...]
    routes: Routes
    waited_s: float
    rows_s: float
    nbytes: int


class TokenExchange:
    """The exchanges of one rank. All ranks call ``dispatch``, then ``combine``, layer by layer, with tokens or without.

    ``dtype``: of the hidden states, also on the way back.
    """

    def __init__(self, group: RankGroup, *, hidden: int, top_k: int, dtype: torch.dtype) -> None:
        self._group = group
        self._hidden, self._top_k, self._dtype = hidden, top_k, dtype
        self.aside: Aside | None = None
        self.learning: Learning | None = None
        self._row_bytes = -(-(8 * top_k + hidden * dtype.itemsize) // 8) * 8

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self._group.device

    def nothing(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, choices and weights of no token."""
        device = self._group.device
        hidden_TH = torch.empty(0, self._hidden, dtype=self._dtype, device=device)
        choice_TK = torch.empty(0, self._top_k, dtype=torch.int64, device=device)
        return hidden_TH, choice_TK, torch.empty(0, self._top_k, device=device)

    def dispatch(
        self,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        routes: Routes,
        *,
        layer: int,
        coming: Coming | None = None,
    ) -> Received:
        """Sends every row to where ``routes`` says and returns those that came. Weights travel, and arrive, in fp32.

        ``coming``: None: ranks tell each other first, in a message more.
        """
        waited_s = 0.0
        if coming is None or not (coming.is_exact or self._group.takes_fewer):
            received_R, waited_s = self._headers(routes.sent_R, layer)
            coming = Coming(rows_R=received_R)
        received_R, began_s, aside = coming.rows_R, perf_counter(), self.aside
        came = torch.empty(sum(received_R), self._row_bytes, dtype=torch.uint8, device=self._group.device)
        if not coming.is_exact:
            came.view(torch.int32).numpy()[:, 0] = NO_ROW
        leaving = self._packed(hidden_TH, weights_TK, routes)
        if aside is None:
            self._group.all_to_all(came, leaving, received_R, routes.sent_R)
        else:
            aside.rows_leave()
            self._group.all_to_all(came, leaving, received_R, routes.sent_R, meanwhile=aside.plan_next)
            aside.rows_came()
        if not coming.is_exact:
            came, received_R = _rows_that_came(came, received_R)
        top_k, begin = self._top_k, 8 * self._top_k // self._dtype.itemsize
        return Received(
            hidden_MH=came.view(self._dtype)[:, begin : begin + self._hidden],
            experts_MK=came.view(torch.int32)[:, :top_k].long(),
            weights_MK=came.view(torch.float32)[:, top_k : 2 * top_k],
            received_R=received_R,
            routes=routes,
            waited_s=waited_s,
            rows_s=perf_counter() - began_s,
            nbytes=(sum(routes.sent_R) - routes.sent_R[self._group.rank]) * self._row_bytes,
        )

    def combine(self, partial_MH: torch.Tensor, received: Received, *, tokens: int, layer: int) -> torch.Tensor:
        """Returns each row's outputs to its owner, who adds them up by rank, in fp32: shape (tokens, H) in ``dtype``."""
        routes, aside, learning = received.routes, self.aside, self.learning
        back_NH = torch.empty(len(routes.token_N), self._hidden, dtype=self._dtype, device=self._group.device)
        if aside is not None:
            aside.outputs_leave()
        began_s, wait = perf_counter(), None if learning is None else partial(learning.wait, layer)
        self._group.all_to_all(back_NH, partial_MH.contiguous(), routes.sent_R, received.received_R, while_waiting=wait)
        if learning is not None:
            learning.waited(layer, perf_counter() - began_s)
        if aside is not None:
            aside.outputs_came()
        output_TH = torch.zeros(tokens, self._hidden, device=self._group.device)
        if self._group.device.type == "cpu" and self._dtype == torch.float32:
            add_rows(output_TH.numpy(), routes.token_N.numpy(), back_NH.numpy())
            return output_TH
        for token_N, row_NH in zip(token_pieces(routes), torch.split(back_NH, list(routes.sent_R)), strict=True):
            output_TH.index_add_(0, token_N, row_NH.float())  # each token at most once in a call: in the order of ranks
        return output_TH.to(self._dtype)

    def _headers(self, sent_R: tuple[int, ...], layer: int) -> tuple[tuple[int, ...], float]:
        """How many rows come from each rank, and how long this one waited to hear it."""
        one_each = [1] * self._group.num_ranks
        told = torch.tensor([[rows, layer] for rows in sent_R], device=self._group.device)
        heard = torch.empty_like(told)
        began_s = perf_counter()
        self._group.all_to_all(heard, told, one_each, one_each)
        rows_R, layer_R = zip(*heard.tolist(), strict=True)
        waited_s = perf_counter() - began_s
        assert set(layer_R) == {layer}, f"ranks stand at different MoE layers: {layer_R}"
        return rows_R, waited_s

    def _packed(self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Rows of bytes: experts (int32), weights (fp32), hidden state."""
        top_k, begin = self._top_k, 8 * self._top_k // self._dtype.itemsize
        assert hidden_TH.dtype == self._dtype, f"hidden states are {hidden_TH.dtype}, not {self._dtype}"
        assert weights_TK.shape[1] == top_k, f"{weights_TK.shape[1]} choices a token, not {top_k}"
        rows = torch.empty(len(routes.token_N), self._row_bytes, dtype=torch.uint8, device=self._group.device)
        if self._group.device.type == "cpu" and self._hidden * self._dtype.itemsize % 4 == 0:
            of_rows = rows.view(torch.int32).numpy(), rows.view(torch.float32).numpy()
            of_tokens = weights_TK.float().contiguous().numpy(), hidden_TH.contiguous().view(torch.int32).numpy()
            fill_rows(*of_rows, routes.token_N.numpy(), routes.experts_NK.numpy(), *of_tokens)
            return rows
        rows.view(torch.int32)[:, :top_k].copy_(routes.experts_NK)
        rows.view(torch.float32)[:, top_k : 2 * top_k].copy_(weights_TK.index_select(0, routes.token_N))
        rows.view(self._dtype)[:, begin : begin + self._hidden].copy_(hidden_TH.index_select(0, routes.token_N))
        return rows


def _rows_that_came(came: torch.Tensor, most_R: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Without the places that were left empty, and how many came from each rank. In host memory, in place."""
    is_row_M = came.view(torch.int32)[:, 0].numpy() != NO_ROW
    came_R = close_up(came.view(torch.int64).numpy(), is_row_M, np.array(most_R, dtype=np.int64))
    return came[: int(came_R.sum())], tuple(came_R.tolist())


def token_pieces(routes: Routes) -> tuple[torch.Tensor, ...]:
    """``token_N`` by destination."""
    return torch.split(routes.token_N, list(routes.sent_R))
