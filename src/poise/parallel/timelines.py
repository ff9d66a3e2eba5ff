"""The ranks' timelines brought together on rank 0, on its clock.

Clocks of different machines differ, so they are compared by messages: rank 0 asks, a rank answers with its time, and that time
lies between the question and the arrival of the answer. The quickest of several rounds leaves the least room for error. Drift
during a run is not corrected: clocks are compared when it is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns

import torch

from poise.parallel.group import RankGroup
from poise.spec.timeline import Span

ROUNDS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockOffset:
    """``ahead_ns``: a rank's clock less that of rank 0, known to ``error_ns`` either way."""

    ahead_ns: int
    error_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimeline:
    """What a rank did, in times of rank 0's clock, and how well that is known."""

    rank: int
    spans: tuple[Span, ...]
    clock: ClockOffset


def clock_offsets(group: RankGroup, *, clock: Callable[[], int] = perf_counter_ns) -> tuple[ClockOffset, ...]:
    """All ranks at once: of every rank, on rank 0; empty on the others. ``clock``: this rank's, nanoseconds."""
    best: list[ClockOffset] = []
    for _ in range(ROUNDS):
        asked_ns = clock()
        _from_first(group)
        heard_ns = clock()
        times_R = _to_first(group, torch.tensor([heard_ns])).tolist()
        between_ns = clock() - asked_ns
        found = [
            ClockOffset(ahead_ns=time_ns - asked_ns - between_ns // 2, error_ns=between_ns // 2) for time_ns in times_R
        ]
        best = found if not best or found[0].error_ns < best[0].error_ns else best
    if best:
        best[0] = ClockOffset(ahead_ns=0, error_ns=0)
    return tuple(best)


def gather_timelines(group: RankGroup, spans: Sequence[Span]) -> tuple[RankTimeline, ...]:
    """All ranks at once, between passes: everybody's spans, on rank 0; empty on the others."""
    clocks = clock_offsets(group)
    rows = [[span.track, span.name, span.begin_ns, span.end_ns, dict(span.detail)] for span in spans]
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    lengths = _to_first(group, torch.tensor([len(text)])).tolist()
    texts = torch.split(_to_first(group, text, lengths), lengths)
    return tuple(
        RankTimeline(rank=rank, spans=tuple(_shifted(text, clock)), clock=clock)
        for rank, (text, clock) in enumerate(zip(texts, clocks, strict=True))
    )


def _shifted(text: torch.Tensor, clock: ClockOffset) -> list[Span]:
    spans = [Span(*row) for row in json.loads(text.cpu().numpy().tobytes())]
    ahead_ns = clock.ahead_ns
    return [replace(span, begin_ns=span.begin_ns - ahead_ns, end_ns=span.end_ns - ahead_ns) for span in spans]


def _from_first(group: RankGroup) -> None:
    """Rank 0 lets all others know that it is here."""
    ranks, first = group.num_ranks, [1] + [0] * (group.num_ranks - 1)
    said = torch.zeros(ranks if group.is_first else 0, dtype=torch.int64, device=group.device)
    heard = torch.empty(1, dtype=torch.int64, device=group.device)
    group.all_to_all(heard, said, first, [1] * ranks if group.is_first else [0] * ranks)


def _to_first(group: RankGroup, mine: torch.Tensor, lengths_R: Sequence[int] | None = None) -> torch.Tensor:
    """Everybody's numbers, one rank's after the other's, on rank 0; nothing elsewhere. ``lengths_R``: None for one each."""
    ranks = group.num_ranks
    come_R = list(lengths_R or [1] * ranks) if group.is_first else [0] * ranks
    heard = torch.empty(sum(come_R), dtype=mine.dtype, device=group.device)
    group.all_to_all(heard, mine.to(group.device), come_R, [len(mine)] + [0] * (ranks - 1))
    return heard
