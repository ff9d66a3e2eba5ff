"""How keys and values of one cache layer lie in memory or in a file: token by token, all rows of a token side by side.

So a cache grows at its end only: what is not written yet takes no memory, and on disk a pass appends one stretch.
Legend: B rows, H heads, T tokens, D head size, W a row's keys and values of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from poise.plan.memory import CACHE_LINE

_COMPACTED_TOKENS = 64
"""Records that are cut to fewer rows at once; bounds the copy made on the way."""


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """One token of one row: all heads' keys, then all heads' values."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor) -> CacheRecord:
        """For keys and values as these."""
        (_, key_heads, _, key_size), (_, value_heads, _, value_size) = keys_BHTD.shape, values_BHTD.shape
        return cls(key_heads, key_size, value_heads, value_size, keys_BHTD.dtype)

    @property
    def width(self) -> int:
        return self.key_heads * self.key_size + self.value_heads * self.value_size

    def stride_bytes(self, rows: int) -> int:
        """From one token to the next: the smallest odd multiple of a cache line that holds ``rows`` records.

        Steps of a power of two meet in the same few lines of the processor's cache: attention took three times as long.
        """
        lines = -(-rows * self.width * self.dtype.itemsize // CACHE_LINE)
        return (lines | 1) * CACHE_LINE

    def tokens_TBW(self, memory: torch.Tensor, tokens: int, rows: int) -> torch.Tensor:
        """The first ``tokens`` tokens of memory (uint8) that begins with one."""
        flat = memory[: tokens * self.stride_bytes(rows)].view(self.dtype)
        return flat.view(tokens, -1)[:, : rows * self.width].view(tokens, rows, self.width)

    def keys_BHTD(self, memory_TBW: torch.Tensor) -> torch.Tensor:
        keys = memory_TBW[..., : self.key_heads * self.key_size]
        return keys.view(*keys.shape[:2], self.key_heads, self.key_size).permute(1, 2, 0, 3)

    def values_BHTD(self, memory_TBW: torch.Tensor) -> torch.Tensor:
        values = memory_TBW[..., self.key_heads * self.key_size :]
        return values.view(*values.shape[:2], self.value_heads, self.value_size).permute(1, 2, 0, 3)


def copy_rows(from_TBW: torch.Tensor, to_TBW: torch.Tensor, rows: Sequence[int]) -> None:
    """Rows of every token, in this order. Both may begin at one place where the second's tokens lie no farther apart."""
    for begin in range(0, len(from_TBW), _COMPACTED_TOKENS):
        chunk = slice(begin, begin + _COMPACTED_TOKENS)
        to_TBW[chunk] = from_TBW[chunk, list(rows)]
