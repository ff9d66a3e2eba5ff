"""What passes over the layers move and compute, in seconds: Klotski's inequalities, extended. Pure functions of numbers.

Letters: n batches of bs rows, L layers, E experts of a layer, T tokens. A pass computes attention batch by batch, then
every active expert once; the disk brings what is not in memory meanwhile, and may run ahead by K experts.

Beyond the paper (section 5): caches that lie on disk, dense layers that stream, experts that stay in memory, and how far
the disk may run ahead. A time is the larger of disk and compute plus what neither can hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


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
class Routing:
    """``choice_LE[l, e]``: the chance that a token of layer l chooses expert e; each row sums to top-k."""

    choice_LE: Floats

    @classmethod
    def uniform(cls, experts_L: Sequence[int], top_k: int) -> Routing:
        """Every expert alike: what is assumed where nothing was recorded."""
        choice_LE = np.zeros((len(experts_L), max(experts_L)))
        for layer, experts in enumerate(experts_L):
            choice_LE[layer, :experts] = min(1.0, top_k / experts)
        return cls(choice_LE=choice_LE)

    @classmethod
    def recorded(cls, counts_LE: npt.ArrayLike, top_k: int) -> Routing:
        """From how often each expert was chosen. A layer without counts has uniform routing."""
        counts = np.asarray(counts_LE, dtype=np.float64)
        total_L1 = counts.sum(axis=1, keepdims=True)
        share = np.where(total_L1 > 0, counts / np.maximum(total_L1, 1.0), 1.0 / counts.shape[1])
        return cls(choice_LE=np.minimum(1.0, share * top_k))

    @property
    def top_k(self) -> float:
        """Experts per token."""
        return float(self.choice_LE.sum() / len(self.choice_LE))

    def used_LE(self, tokens: int) -> Floats:
        """The chance that a pass of ``tokens`` tokens uses each expert at all, tokens choosing independently."""
        return np.asarray(1.0 - (1.0 - self.choice_LE) ** tokens)

    def active_and_missing(self, tokens: int, resident: int) -> tuple[float, float]:
        """Experts that a pass uses, and those of them not in memory when the likeliest ``resident`` stay there."""
        used = np.sort(self.used_LE(tokens), axis=None)[::-1]
        return float(used.sum()), float(used[resident:].sum())


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What is where. ``resident`` experts stay in memory, the disk may read ``ahead`` experts before they are asked for;
    ``streamed_bytes`` of dense weights are read in each pass, and caches, ``cache_bytes_per_token``, where they lie on disk."""

    resident: int
    ahead: int
    streamed_bytes: int
    cache_bytes_per_token: int


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
    """Seconds of one pass. ``exposed_s`` is what runs behind nothing; ``limit_s`` is the larger of disk and compute."""

    disk_s: float
    compute_s: float
    exposed_s: float
    inequalities: tuple[Inequality, ...]

    @property
    def limit_s(self) -> float:
        return max(self.disk_s, self.compute_s)

    @property
    def seconds(self) -> float:
        return self.limit_s + self.exposed_s


def experts_ahead(attention_s: float, expert_io_s: float, num_slots: int) -> int:
    """K: experts that the disk can bring while the attention of all batches computes; at most half of the slots."""
    return max(1, min(math.ceil(attention_s / expert_io_s), num_slots // 2))


def attention_layer_s(shape: PassShape, costs: LayerCosts) -> float:
    """Attention and gates of all batches of a pass, one layer."""
    total = 0.0
    for tokens, row_tokens in ((shape.decode_rows, 1), (shape.prefill_tokens, shape.chunk_tokens)):
        batch_tokens = shape.batch_size * row_tokens
        whole, rest = divmod(tokens, batch_tokens)
        for count, rows in ((whole, shape.batch_size), (1, math.ceil(rest / row_tokens))):
            if count and rows:
                one = costs.attention_s(rows=rows, row_tokens=row_tokens, context_tokens=shape.context_tokens)
                total += count * (one + costs.gate_s(rows * row_tokens))
    return total


def time_pass(
    shape: PassShape, held: Held, *, costs: LayerCosts, routing: Routing, expert_bytes: int, num_layers: int
) -> PassTime:
    """The time of one pass. ``num_layers`` counts all decoder layers, the routing's rows those with experts."""
    moe_layers = len(routing.choice_LE)
    active, missing = routing.active_and_missing(shape.tokens, held.resident)
    expert_io_s = expert_bytes / costs.disk_bytes_per_s
    dense_io_s = held.streamed_bytes / costs.disk_bytes_per_s
    moved_tokens = shape.decode_rows * (shape.context_tokens + 1) + 2 * shape.prefill_tokens
    cache_io_s = held.cache_bytes_per_token * moved_tokens / costs.disk_bytes_per_s
    attention_s = attention_layer_s(shape, costs)
    active_l = max(active / moe_layers, 1.0)
    experts_s = costs.experts_s(max(shape.tokens * routing.top_k, active_l), active_l)
    rows = shape.decode_rows + math.ceil(shape.prefill_tokens / shape.chunk_tokens)
    disk_s = missing * expert_io_s + dense_io_s + cache_io_s
    compute_s = num_layers * attention_s + moe_layers * experts_s + costs.head_s(rows)
    missing_l = missing / moe_layers
    ahead = min(float(held.ahead), missing_l)
    late = max(missing_l - ahead, 0.0)
    other_io_s = (dense_io_s + cache_io_s) / num_layers
    hot_s = experts_s * (1.0 - late / active_l)
    inequalities = (
        Inequality(name="attention hides dense weights and caches", compute_s=attention_s, io_s=other_io_s),
        Inequality(
            name="attention hides prefetched experts too", compute_s=attention_s, io_s=other_io_s + ahead * expert_io_s
        ),
        Inequality(
            name="with the experts at hand, one more",
            compute_s=attention_s + hot_s,
            io_s=other_io_s + (ahead + 1.0) * expert_io_s,
        ),
        Inequality(
            name="the layer hides all its reads",
            compute_s=attention_s + experts_s,
            io_s=other_io_s + missing_l * expert_io_s,
        ),
    )
    if disk_s >= compute_s:  # the disk stands still when it may not read further ahead
        exposed_s = moe_layers * max(0.0, attention_s - held.ahead * expert_io_s - other_io_s) if missing_l else 0.0
    else:  # compute stands still until the first expert is there, unless some are
        exposed_s = moe_layers * max(0.0, expert_io_s - attention_s) if late and not held.resident else 0.0
    return PassTime(disk_s=disk_s, compute_s=compute_s, exposed_s=exposed_s, inequalities=inequalities)
