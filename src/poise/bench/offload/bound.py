"""What no schedule can beat, pass by pass: the larger of the fewest bytes over the disk's rate and the compute at product rate.

Pure functions of what was recorded of a run (which expert got how many tokens in which pass). The fewest bytes: experts that
were used and could not have been in memory (Belady's rule with the whole future known, all memory that the fewest dense
weights, keys, values and activations leave given to experts), and what of dense weights and caches must stream as it does not
fit at all. Bytes that a run chose to read count nowhere. Compute: every matrix product at the rate that was measured for its
shape and its tokens; attention scores, norms, routing and sampling take no time. Letters: N passes, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """``room_bytes``: memory for weights, caches and activations together. Activations: what one token's must at least take."""

    room_bytes: int
    expert_bytes: int
    dense_bytes: int
    cache_bytes_per_token: int
    activation_bytes_per_token: int


class ProductTimes(Protocol):
    """Seconds of the model's matrix products, each for an array of tokens."""

    def expert_s(self, tokens: Any) -> Any:
        """One expert."""
        ...

    def layer_s(self, tokens: Any) -> Any:
        """The dense part of one layer."""
        ...

    def head_s(self, tokens: Any) -> Any:
        """The logits."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PassWork:
    """What a pass had to do: its real tokens, those whose logits were needed, and the tokens that lay in caches before it.

    ``counts_LE``: tokens that chose each expert.
    """

    counts_LE: Ints
    tokens: int
    logits: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLimit:
    """The least time of a pass. ``resident``: experts that could be in memory; ``fewest_bytes`` had to be read."""

    resident: int
    fewest_bytes: int
    disk_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """The larger of the two, as they can overlap."""
        return max(self.disk_s, self.compute_s)


def pass_limits(
    works: Sequence[PassWork], sizes: Sizes, products: ProductTimes, *, read_bytes_per_s: float
) -> list[PassLimit]:
    """The limit of every pass of a run, in order, from empty memory on. Reads count in the pass that needs them."""
    rooms = [_room(work, sizes) for work in works]
    used_NLE = np.stack([work.counts_LE > 0 for work in works])
    reads_N = fewest_reads(used_NLE, [resident for resident, _ in rooms])
    limits = []
    for work, (resident, streamed_bytes), reads in zip(works, rooms, reads_N, strict=True):
        fewest_bytes = int(reads) * sizes.expert_bytes + streamed_bytes
        compute_s = (
            float(np.sum(products.expert_s(work.counts_LE)))
            + len(work.counts_LE) * float(products.layer_s(np.array(work.tokens)))
            + float(products.head_s(np.array(work.logits)))
        )
        limits.append(
            PassLimit(
                resident=resident,
                fewest_bytes=fewest_bytes,
                disk_s=fewest_bytes / read_bytes_per_s,
                compute_s=compute_s,
            )
        )
    return limits


def _room(work: PassWork, sizes: Sizes) -> tuple[int, int]:
    """Experts that fit beside everything else, at least the one that computes; bytes that do not fit and must stream."""
    others = sizes.dense_bytes + work.cached_tokens * sizes.cache_bytes_per_token
    left = sizes.room_bytes - work.tokens * sizes.activation_bytes_per_token - others
    return max(1, left // sizes.expert_bytes), max(0, -left)


def fewest_reads(used_NLE: Bools, capacity_N: Sequence[int]) -> Ints:
    """The fewest experts that must be read in each pass, (N,), by Belady's rule: keep those whose next use is nearest.

    ``capacity_N``: experts that fit in memory during each pass. A layer's experts are used at once, those in memory first; one
    that is read for its use alone takes no other's place. Memory is empty at first.
    """
    passes, layers, experts = used_NLE.shape
    next_LE = np.full((layers, experts), NEVER, dtype=np.int64)
    next_NLE = np.empty(used_NLE.shape, dtype=np.int64)
    for step in range(passes - 1, -1, -1):
        next_NLE[step] = next_LE
        position_L1 = (step * layers + np.arange(layers))[:, None]
        next_LE = np.where(used_NLE[step], position_L1, next_LE)
    held_LE = np.zeros((layers, experts), dtype=bool)
    due_LE = np.full((layers, experts), NEVER, dtype=np.int64)
    reads_N = np.zeros(passes, dtype=np.int64)
    for step in range(passes):
        _keep_nearest(held_LE, due_LE, capacity_N[step])
        for layer in range(layers):
            used_E = used_NLE[step, layer]
            reads_N[step] += int(np.count_nonzero(used_E & ~held_LE[layer]))
            due_LE[layer] = np.where(used_E, next_NLE[step, layer], due_LE[layer])
            held_LE[layer] |= used_E
            _keep_nearest(held_LE, due_LE, capacity_N[step])
    return reads_N


def _keep_nearest(held_LE: Bools, due_LE: Ints, capacity: int) -> None:
    """Drops what is never used again, and what is due last beyond ``capacity``."""
    held_LE &= due_LE < NEVER
    (held,) = np.nonzero(held_LE.ravel())
    if len(held) > capacity:
        by_due = np.argsort(due_LE.ravel()[held], kind="stable")
        held_LE.ravel()[held[by_due[capacity:]]] = False
