"""Keys and values that lie in memory in one place from the first token to the last, instead of being copied as they grow.

transformers' layer is concatenated anew in every pass: twice its bytes while that lasts, holes in the heap that no budget
foresees, and a copy of all the past for one token more. Here room for the final length is taken once; the system gives the
memory when tokens are written. Windows, indexers and recurrent states stay as they are (``model.cache``).
Legend: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class GrownLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """One layer of a cache. ``keys`` and ``values`` are views of what has been written, shapes (B, H, T, D)."""

    def __init__(self, final_tokens: int) -> None:
        super().__init__()
        self._final_tokens = final_tokens
        self._tokens = 0
        self._keys_BHTD: torch.Tensor | None = None
        self._values_BHTD: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past and the new tokens, shapes (B, H, T, D): views, which the next update adds to."""
        end = self._tokens + key_states.shape[-2]
        assert end <= self._final_tokens, f"a cache for {self._final_tokens} tokens was given {end}"
        if self._keys_BHTD is None or self._values_BHTD is None:
            self._keys_BHTD, self._values_BHTD = self._room(key_states), self._room(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._keys_BHTD[:, :, self._tokens : end].copy_(key_states)
        self._values_BHTD[:, :, self._tokens : end].copy_(value_states)
        self._tokens = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self._tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Leaves these rows, in this order, and gives the others' memory back."""
        if self._keys_BHTD is None or self._values_BHTD is None:
            return
        rows = beam_idx.tolist()
        self._keys_BHTD = self._only(self._keys_BHTD, rows)
        self._values_BHTD = self._only(self._values_BHTD, rows)
        self._show()

    def _show(self) -> None:
        assert self._keys_BHTD is not None, "a layer that has seen no token has no shape"
        assert self._values_BHTD is not None, "a layer that has seen no token has no shape"
        self.keys = self._keys_BHTD[:, :, : self._tokens]
        self.values = self._values_BHTD[:, :, : self._tokens]

    def _room(self, states_BHTD: torch.Tensor) -> torch.Tensor:
        rows, heads, _, size = states_BHTD.shape
        return states_BHTD.new_empty(rows, heads, self._final_tokens, size)

    def _only(self, whole_BHTD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Row by row: what was never written is not touched, and a copy is one row at a time."""
        _, heads, tokens, size = whole_BHTD.shape
        kept_BHTD = whole_BHTD.new_empty(len(rows), heads, tokens, size)
        for place, row in enumerate(rows):
            kept_BHTD[place, :, : self._tokens].copy_(whole_BHTD[row, :, : self._tokens])
        return kept_BHTD
