"""What a group of batches takes in memory besides weights: caches, activations, overhead. Pure functions of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from poise.spec.model_spec import CacheSpec
from poise.units import MIB

OVERHEAD_BYTES = 80 * MIB
"""Threads, compiled kernels, allocator slack, Python objects: what grows with nothing a plan decides."""
WIDE_BYTES = 4
"""Of an element that goes in and out of a product: those with bf16 matrices may be computed in fp32."""
CACHE_SLACK = 8
"""Caches that grow take an eighth more than their bytes: each leaves holes that are too small for the next (measured: 14 %)."""
CACHE_LINE = 64
PAGE_BYTES = 4096
"""Caches that lie in one place from the start take a page for each layer of a batch, and up to two lines beside each token."""
ACTIVATION_SLACK = 16
"""A pass takes a sixteenth more than its tensors: holes between them (measured: 19 of 587 MB with 8,192 tokens)."""
WIDE_BLOCK_BYTES = 6 << 20
"""Of such a matrix, what is fp32 at a time: little enough for the processor's cache, and for the heap to keep."""
MAX_EXPERT_ROWS = 512
"""Rows that go through an expert at once: enough for the processor's full rate, few enough to bound what they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSpec:
    """What one token takes while a pass runs. ``width`` is the widest inner size of a layer; bytes per element ``itemsize``.

    ``expert_width`` is an expert's widest inner size (gate and up together); it sees at most ``MAX_EXPERT_ROWS`` at once.
    ``materialised_heads`` counts the heads whose attention scores are written out in fp32 (0 where a fused kernel runs).
    ``repeated_width``: elements of keys and values that a token of the past takes in a layer where attention copies them for
    each of the query heads that share them (0 where none do).
    """

    hidden: int
    width: int
    expert_width: int
    top_k: int
    vocabulary: int
    itemsize: int
    materialised_heads: int
    repeated_width: int = 0

    def pass_bytes(
        self,
        *,
        batch_size: int,
        num_batches: int,
        chunk_tokens: int,
        context_tokens: int,
        pass_tokens: int | None = None,
        is_masked: bool = True,
    ) -> int:
        """Peak bytes of a pass: every batch parked at its experts, one of them inside a layer.

        ``pass_tokens`` bounds the prompt tokens of a pass, but for one batch's chunk, which always goes. ``is_masked``: whether
        attention gets a mask in some pass; what that takes is counted in any case.
        """
        wide = max(self.itemsize, WIDE_BYTES)
        batch_tokens = batch_size * chunk_tokens
        all_tokens = self.most_tokens(batch_tokens, num_batches, batch_size, pass_tokens)
        parked = all_tokens * ((self.top_k + 4) * self.hidden * self.itemsize + self.top_k * 40)
        inside = batch_tokens * ((8 * self.hidden + 4 * self.width) * self.itemsize + (self.hidden + self.width) * wide)
        scores = batch_tokens * context_tokens * (8 + 12 * self.materialised_heads)
        repeated = batch_size * context_tokens * self.repeated_width * self.itemsize
        logits = num_batches * batch_size * self.vocabulary * (self.itemsize + 4)
        expert_rows = min(MAX_EXPERT_ROWS, all_tokens)
        expert = expert_rows * (2 * self.expert_width * wide + self.hidden * (self.itemsize + 2 * wide + 8))
        largest = WIDE_BYTES * self.hidden * max(self.width, self.expert_width)
        block = min(WIDE_BLOCK_BYTES, largest) if self.itemsize < WIDE_BYTES else 0
        whole = parked + inside + expert + scores + repeated + logits + block
        return whole + whole // ACTIVATION_SLACK

    @staticmethod
    def most_tokens(batch_tokens: int, num_batches: int, batch_size: int, pass_tokens: int | None) -> int:
        """Tokens of a pass at the most; rows that decode go beside the prompts of others."""
        everything = num_batches * batch_tokens
        if pass_tokens is None:
            return everything
        return min(everything, max(batch_tokens, pass_tokens) + num_batches * batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTokens:
    """How long rows may become: ``longest``, and ``sum_R[r]`` of the r longest; ``batch_size`` rows make a batch."""

    batch_size: int
    longest: int
    sum_R: tuple[int, ...]

    @classmethod
    def of(cls, prompt_tokens: Sequence[int], total_tokens: Sequence[int], batch_size: int) -> CacheTokens:
        """Batches take prompts in order of length; a row is as long as its batch's longest prompt and its own answer."""
        lengths = sorted(zip(prompt_tokens, total_tokens, strict=True), reverse=True)
        widths = [lengths[index // batch_size * batch_size][0] for index in range(len(lengths))]
        needs = sorted(
            (width + total - prompt for width, (prompt, total) in zip(widths, lengths, strict=True)), reverse=True
        )
        return cls(batch_size=batch_size, longest=needs[0], sum_R=tuple(itertools.accumulate(needs, initial=0)))

    def most(self, rows: int) -> int:
        """Tokens of the ``rows`` rows that are longest, or of all."""
        return self.sum_R[min(rows, len(self.sum_R) - 1)]

    def bytes_in(self, cache: CacheSpec, rows: int) -> int:
        """Caches of the rows that can run at once and take most; a layer that grows, or loses rows, is copied."""
        rows = min(rows, len(self.sum_R) - 1)
        copied = self.batch_size * self.longest * cache.largest_layer_bytes_per_token
        batches = math.ceil(rows / self.batch_size)
        beside = batches * cache.movable_layers * (2 * CACHE_LINE * self.longest + PAGE_BYTES)
        placed = self.most(rows) * cache.movable_bytes_per_token + beside
        grown = rows * cache.state_bytes + self.most(rows) * (cache.bytes_per_token - cache.movable_bytes_per_token)
        return placed + grown + grown // CACHE_SLACK + 2 * copied
