"""What passes over the layers move and compute, in seconds: Klotski's inequalities, extended. Pure functions of numbers.

Letters: n batches of bs rows, L layers, E experts of a layer, T tokens, K experts read ahead. A pass computes attention batch
by batch, then every active expert once; the disk brings what is not in memory meanwhile.

Beyond the paper (section 5): caches that lie on disk, dense layers that stream, experts that stay in memory, and what K buys.
The reads that a layer needs are known when its first batch has passed the router; until then the disk may only read K ahead.
So from the end of one layer's experts to the end of the next's it takes the longest of four: all compute; all reads; the
first batch's attention, then the reads that are not ahead, then the expert that came last; and all batches' attention, then the
reads for which no slot was free before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from poise.plan.routing import Floats, Routing

UNDER_WAY = 4
"""Of the experts that are read ahead, so many do not keep the disk busy until the next router speaks: two readers are at the
layer's last ones, and what is in memory differs from layer to layer. Measured with 137 slots, experts of 9.4 ms: the disk idled
for 27, 13 and 0 ms a layer at K = 1, 4 and 16."""


class LayerCosts(Protocol):
    """Seconds on this machine for one layer (``head_s``: for the whole pass), and the disk's rate."""

    @property
    def disk_bytes_per_s(self) -> float: ...

    def attention_s(self, *, rows: int, row_tokens: int, context_tokens: int) -> float:
        """One batch through everything of a layer but its gate and its experts."""
        ...

    def gate_s(self, tokens: int) -> float:
        """One batch through the router."""
        ...

    def experts_s(self, tokens: float, active: float) -> float:
        """``tokens`` rows in all through ``active`` experts."""
        ...

    def head_s(self, rows: int) -> float:
        """Logits of ``rows`` rows."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PassShape:
    """One pass: ``decode_rows`` rows bring a token each, ``prefill_tokens`` come as chunks of ``chunk_tokens`` per row."""

    batch_size: int
    decode_rows: int
    prefill_tokens: int
    chunk_tokens: int
    context_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that go through the experts."""
        return self.decode_rows + self.prefill_tokens

    @property
    def prefill_rows(self) -> int:
        """Rows that bring a chunk."""
        return math.ceil(self.prefill_tokens / self.chunk_tokens)

    @property
    def num_batches(self) -> int:
        """Batches of at most ``batch_size`` rows."""
        return math.ceil(self.decode_rows / self.batch_size) + math.ceil(self.prefill_rows / self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What is where. ``resident`` experts stay in memory, the disk may read ``ahead`` experts before they are asked for;
    ``streamed_bytes`` of dense weights are read in each pass, and caches, ``cache_bytes_per_token``, where they lie on disk.
    ``slots``: experts that fit at once, where these may be fewer than a layer has: until every batch has passed the router
    none of them is free again."""

    resident: int
    ahead: int
    streamed_bytes: int
    cache_bytes_per_token: int
    slots: int | None = None

    @property
    def is_single(self) -> bool:
        """Whether all experts pass through one slot, each read only when the one before has computed."""
        return self.slots == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Inequality:
    """One of the paper's conditions for a pipeline without bubbles: compute that hides, I/O that is hidden, in seconds."""

    name: str
    compute_s: float
    io_s: float

    @property
    def holds(self) -> bool:
        return self.compute_s >= self.io_s


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of one pass. ``exposed_s`` is what runs behind nothing; ``limit_s`` is the larger of disk and compute.

    ``active`` and ``missing``: experts that the pass uses, and those of them that it reads.
    """

    disk_s: float
    compute_s: float
    exposed_s: float
    active: float = 0.0
    missing: float = 0.0
    inequalities: tuple[Inequality, ...] = ()

    @property
    def limit_s(self) -> float:
        return max(self.disk_s, self.compute_s)

    @property
    def seconds(self) -> float:
        return self.limit_s + self.exposed_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What a pass computes, whatever lies where. Per layer but for ``head_s``; ``first_s`` is one batch's attention.

    ``missing_S[s]``: experts that the pass reads when the likeliest s stay in memory.
    """

    attention_s: float
    first_s: float
    experts_s: float
    head_s: float
    active: float
    missing_S: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What one layer reads: ``missing`` experts, ``late`` of them after its first batch, ``last`` after the last one's router;
    experts whose compute hides no read, usually the one that came last, take ``tail_s``."""

    expert_io_s: float
    missing: float
    late: float
    last: float
    dense_io_s: float
    cache_io_s: float
    tail_s: float


class PassTimer:
    """Times passes of one model on one machine; remembers what it has worked out.

    ``num_layers`` counts all decoder layers, the routing's rows those with experts. ``under_way``: as ``UNDER_WAY`` says.
    """

    def __init__(
        self,
        costs: LayerCosts,
        routing: Routing,
        *,
        expert_bytes: int,
        num_layers: int,
        under_way: int = UNDER_WAY,
    ) -> None:
        self._costs = costs
        self._under_way = under_way
        self._routing = routing
        self._moe_layers = len(routing.choice_LE)
        self._plain_layers = max(0, num_layers - self._moe_layers)
        self._rate = costs.disk_bytes_per_s
        self._expert_io_s = expert_bytes / costs.disk_bytes_per_s
        self._works: dict[PassShape, _Work] = {}
        self._missing_S: dict[int, Floats] = {}

    @property
    def expert_io_s(self) -> float:
        """Seconds to read an expert."""
        return self._expert_io_s

    def seconds(self, shape: PassShape, held: Held) -> tuple[float, float]:
        """Seconds of the pass, and the limit under them: the larger of disk and compute."""
        work = self._work(shape)
        parts = self._parts(shape, work, held)
        disk_s, compute_s = self._disk_s(parts), self._compute_s(work)
        return self._pass_s(shape, work, parts), max(disk_s, compute_s)

    def time(self, shape: PassShape, held: Held) -> PassTime:
        """All about the pass."""
        work = self._work(shape)
        parts = self._parts(shape, work, held)
        disk_s, compute_s = self._disk_s(parts), self._compute_s(work)
        return PassTime(
            disk_s=disk_s,
            compute_s=compute_s,
            exposed_s=max(0.0, self._pass_s(shape, work, parts) - max(disk_s, compute_s)),
            active=work.active,
            missing=parts.missing * self._moe_layers,
            inequalities=_inequalities(work, parts, work.active / self._moe_layers),
        )

    def _disk_s(self, parts: _Parts) -> float:
        others_s = (self._moe_layers + self._plain_layers) * (parts.dense_io_s + parts.cache_io_s)
        return self._moe_layers * parts.missing * parts.expert_io_s + others_s

    def _compute_s(self, work: _Work) -> float:
        layers = self._moe_layers + self._plain_layers
        return layers * work.attention_s + self._moe_layers * work.experts_s + work.head_s

    def _pass_s(self, shape: PassShape, work: _Work, parts: _Parts) -> float:
        """Layer for layer; the head and the layers without experts come before one of them."""
        plain_io_s = self._plain_layers * (parts.dense_io_s + parts.cache_io_s)
        before_s = work.head_s + self._plain_layers * work.attention_s
        first = self._layer_s(shape, work, parts, before_s, plain_io_s)
        return first + (self._moe_layers - 1) * self._layer_s(shape, work, parts, 0.0, 0.0)

    def _layer_s(self, shape: PassShape, work: _Work, parts: _Parts, before_s: float, before_io_s: float) -> float:
        """From the end of one layer's experts to the end of the next's; ``before_s`` is computed first."""
        compute_s = before_s + work.attention_s + work.experts_s
        others_s = parts.dense_io_s + parts.cache_io_s + before_io_s
        disk_s = parts.missing * parts.expert_io_s + others_s
        if not parts.missing:
            return max(compute_s, disk_s)
        batches = shape.num_batches
        first_s = before_s + max(work.first_s, parts.cache_io_s / batches)
        rest_io_s = parts.cache_io_s * (batches - 1) / batches + parts.late * parts.expert_io_s
        all_s = before_s + work.attention_s + parts.last * parts.expert_io_s
        return max(compute_s, disk_s, max(first_s + rest_io_s, all_s) + parts.tail_s)

    def _parts(self, shape: PassShape, work: _Work, held: Held) -> _Parts:
        layers = self._moe_layers + self._plain_layers
        missing = float(work.missing_S[min(held.resident, len(work.missing_S) - 1)]) / self._moe_layers
        moved_tokens = shape.decode_rows * (shape.context_tokens + 1) + 2 * shape.prefill_tokens
        expert_s = work.experts_s * self._moe_layers / max(work.active, self._moe_layers)
        return _Parts(
            expert_io_s=self._expert_io_s,
            missing=missing,
            late=max(missing - max(held.ahead - self._under_way, 0), 0.0),
            last=max(missing - held.slots, 0.0) if held.slots is not None else 0.0,
            dense_io_s=held.streamed_bytes / self._rate / layers,
            cache_io_s=held.cache_bytes_per_token * moved_tokens / self._rate / layers,
            tail_s=expert_s * (max(missing, 1.0) if held.is_single else 1.0),
        )

    def _work(self, shape: PassShape) -> _Work:
        found = self._works.get(shape)
        if found is None:
            self._works[shape] = found = self._worked_out(shape)
        return found

    def _worked_out(self, shape: PassShape) -> _Work:
        missing_S = self._missing_S.get(shape.tokens)
        if missing_S is None:
            self._missing_S[shape.tokens] = missing_S = self._routing.missing_S(shape.tokens)
        active = float(missing_S[0])
        active_l = max(active / self._moe_layers, 1.0)
        attention_s, first_s = _attention(shape, self._costs)
        return _Work(
            attention_s=attention_s,
            first_s=first_s,
            experts_s=self._costs.experts_s(max(shape.tokens * self._routing.top_k, active_l), active_l),
            head_s=self._costs.head_s(shape.decode_rows + shape.prefill_rows),
            active=active,
            missing_S=missing_S,
        )


def time_pass(
    shape: PassShape, held: Held, *, costs: LayerCosts, routing: Routing, expert_bytes: int, num_layers: int
) -> PassTime:
    """The time of one pass. ``num_layers`` counts all decoder layers, the routing's rows those with experts."""
    return PassTimer(costs, routing, expert_bytes=expert_bytes, num_layers=num_layers).time(shape, held)


def _attention(shape: PassShape, costs: LayerCosts) -> tuple[float, float]:
    """Attention and gates of one layer: of all batches of the pass, and of the one that takes longest."""
    total = longest = 0.0
    for tokens, row_tokens in ((shape.decode_rows, 1), (shape.prefill_tokens, shape.chunk_tokens)):
        batch_tokens = shape.batch_size * row_tokens
        whole, rest = divmod(tokens, batch_tokens)
        for count, rows in ((whole, shape.batch_size), (1, math.ceil(rest / row_tokens))):
            if count and rows:
                one = costs.attention_s(rows=rows, row_tokens=row_tokens, context_tokens=shape.context_tokens)
                one += costs.gate_s(rows * row_tokens)
                total += count * one
                longest = max(longest, one)
    return total, longest


def _inequalities(work: _Work, parts: _Parts, active_l: float) -> tuple[Inequality, ...]:
    """Section 5 of the paper, per layer; what it calls G's I/O is all that a layer reads besides experts."""
    ahead = parts.missing - parts.late
    others_s = parts.dense_io_s + parts.cache_io_s
    attention_s, io_s = work.attention_s, parts.expert_io_s
    hot_s = work.experts_s * (1.0 - parts.late / max(active_l, 1.0))
    return (
        Inequality(name="attention hides dense weights and caches", compute_s=attention_s, io_s=others_s),
        Inequality(name="attention hides prefetched experts too", compute_s=attention_s, io_s=others_s + ahead * io_s),
        Inequality(
            name="with the experts at hand, one more",
            compute_s=attention_s + hot_s,
            io_s=others_s + (ahead + min(1.0, parts.late)) * io_s,
        ),
        Inequality(
            name="the layer hides all its reads",
            compute_s=attention_s + work.experts_s,
            io_s=others_s + parts.missing * io_s,
        ),
    )
