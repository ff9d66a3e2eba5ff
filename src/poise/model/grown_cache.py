"""Keys and values that lie in memory in one place from the first token to the last, instead of being copied as they grow.

transformers' layer is concatenated anew in every pass: twice its bytes while that lasts, holes in the heap that no budget
foresees, and a copy of all the past for one token more. Here room for the final length is taken once, from the system and not
from the heap; a page of it takes memory when it is written. Windows, indexers and recurrent states stay as they are
(``model.cache``). Legend: as in ``model.cache_record``.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from poise.model.cache_record import CacheRecord, copy_rows


class GrownLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """One layer of a cache. ``keys`` and ``values`` are views of what has been written, shapes (B, H, T, D)."""

    def __init__(self, final_tokens: int) -> None:
        super().__init__()
        self._final_tokens = final_tokens
        self._tokens = 0
        self._rows = 0
        self._record: CacheRecord | None = None
        self._memory: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past and the new tokens, shapes (B, H, T, D): views, which the next update adds to."""
        begin, end = self._tokens, self._tokens + key_states.shape[-2]
        assert end <= self._final_tokens, f"a cache for {self._final_tokens} tokens was given {end}"
        if self._record is None:
            self._record, self._rows = CacheRecord.of(key_states, value_states), len(key_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._memory = self._room(self._record, self._rows)
        self._tokens = end
        self._show()
        self.keys[:, :, begin:].copy_(key_states)
        self.values[:, :, begin:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self._tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Leaves these rows, in this order, and gives the others' memory back."""
        if self._record is None:
            return
        rows = beam_idx.tolist()
        before_TBW = self._written_TBW()
        self._memory, self._rows = self._room(self._record, len(rows)), len(rows)
        copy_rows(before_TBW, self._written_TBW(), rows)
        self._show()

    def _written_TBW(self) -> torch.Tensor:
        assert self._record is not None, "a layer that has seen no token has no shape"
        assert self._memory is not None, "a layer that has seen no token has no shape"
        return self._record.tokens_TBW(self._memory, self._tokens, self._rows)

    def _show(self) -> None:
        assert self._record is not None, "a layer that has seen no token has no shape"
        written_TBW = self._written_TBW()
        self.keys, self.values = self._record.keys_BHTD(written_TBW), self._record.values_BHTD(written_TBW)

    def _room(self, record: CacheRecord, rows: int) -> torch.Tensor:
        nbytes = self._final_tokens * record.stride_bytes(rows)
        if self.device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
