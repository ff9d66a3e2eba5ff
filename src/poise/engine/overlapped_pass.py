"""A pass in two halves: while one half's tokens travel between ranks, the other half computes.

The seam gives this for any architecture: a half is parked at its experts, so whoever drives it may do something else
meanwhile. Each expert then runs twice, over half the rows, which costs more than it brings where rows are few: decision 032.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from poise.model.seam import Parked
from poise.parallel.courier import Courier
from poise.parallel.exchange import Received
from poise.parallel.moe_layer import ExpertParallelLayers, Turn
from poise.spec.timeline import COMPUTE

T = TypeVar("T")

MIN_ROWS = 256
"""Rows that an expert gets from one half, on average and from all ranks, from which halves are worth it (decision 032)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """Batches that go together; none on a rank that only joins.

    ``start()`` runs them to their first experts, ``park(layer)`` returns them there, ``resume(layer, outputs)`` runs them on to
    the experts of the next layer or to their end.
    """

    real: Sequence[torch.Tensor | None]
    start: Callable[[], None]
    park: Callable[[int], Sequence[Parked]]
    resume: Callable[[int, Sequence[torch.Tensor]], None]


def run_halves(
    halves: Sequence[Half],
    layers: ExpertParallelLayers,
    courier: Courier,
    *,
    num_layers: int,
) -> None:
    """Runs both halves to their end. All ranks at once, with as many halves."""

    def waited(coming: Future[T], name: str) -> T:
        if layers.timeline is None:
            return coming.result()
        with layers.timeline.span(COMPUTE, name):
            return coming.result()

    def send(half: Half, layer: int) -> tuple[Turn, Future[Received]]:
        turn = layers.prepare(half.park(layer), half.real, layer=layer)
        return turn, courier.submit(partial(layers.dispatch, turn))

    def answer(turn: Turn, coming: Future[Received]) -> Future[list[torch.Tensor]]:
        received = waited(coming, "wait: rows")
        computed = layers.compute(turn, received)
        return courier.submit(partial(layers.combine, turn, received, computed))

    sent = []
    for half in halves:
        half.start()
        sent.append(send(half, 0))
    for layer in range(num_layers):
        back = [answer(*each) for each in sent]
        sent = []
        for half, coming in zip(halves, back, strict=True):
            outputs = waited(coming, "wait: outputs")
            half.resume(layer, outputs)
            if layer + 1 < num_layers:
                sent.append(send(half, layer + 1))


def split(tokens: Sequence[int]) -> int:
    """How many of the batches, in order, make the first half: the halves are as equal as may be, neither empty of two."""
    assert len(tokens) > 1, "one batch has no halves"
    return min(range(1, len(tokens)), key=lambda first: abs(sum(tokens[:first]) - sum(tokens[first:])))


def is_worth_it(
    half_tokens_R: Sequence[int],
    works_R: Sequence[bool],
    *,
    top_k: int,
    num_experts: int,
    min_rows: int = MIN_ROWS,
) -> bool:
    """Whether the pass runs in halves, from the tokens of each rank's smaller half: the same answer on every rank."""
    all_have_two = all(tokens > 0 for tokens, works in zip(half_tokens_R, works_R, strict=True) if works)
    return all_have_two and sum(half_tokens_R) * top_k >= min_rows * num_experts
