"""Caches in one place: the same values as transformers' own, no copy for a token more, rows that leave give memory back."""

from __future__ import annotations

import pytest
import torch

from poise.model.cache import drop_rows, keep_in_place, make_cache
from poise.model.grown_cache import GrownLayer
from poise.model.inspect import build_meta_model
from tests.conftest import tiny_config

LAYERS, KEY_HEADS, KEY_SIZE, VALUE_HEADS, VALUE_SIZE = 2, 2, 8, 1, 12
FINAL_TOKENS = 40


class Caches:
    """The same rows in transformers' cache and in one that lies in place."""

    def __init__(self, rows: int) -> None:
        model = build_meta_model(tiny_config("mixtral", num_hidden_layers=LAYERS), torch.float32)
        self.plain, self.placed = make_cache(model), make_cache(model)
        keep_in_place(model, self.placed, final_tokens=FINAL_TOKENS)
        self.rows = rows
        self._generator = torch.Generator().manual_seed(rows)

    def run(self, new_tokens: int) -> None:
        for layer in range(LAYERS):
            keys = torch.randn(self.rows, KEY_HEADS, new_tokens, KEY_SIZE, generator=self._generator)
            values = torch.randn(self.rows, VALUE_HEADS, new_tokens, VALUE_SIZE, generator=self._generator)
            wanted, found = self.plain.update(keys, values, layer), self.placed.update(keys, values, layer)
            assert all(torch.equal(want, each) for want, each in zip(wanted, found, strict=True))
            assert self.placed.get_seq_length(layer) == self.plain.get_seq_length(layer)
            assert self.placed.get_mask_sizes(1, layer) == self.plain.get_mask_sizes(1, layer)

    def keep(self, rows: list[int]) -> None:
        for cache in (self.plain, self.placed):
            drop_rows(cache, torch.tensor(rows), self.rows)
        self.rows = len(rows)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each layer's keys begin, and the bytes of their memory."""
        return [(layer.keys.data_ptr(), layer.keys.untyped_storage().nbytes()) for layer in self.placed.layers]


def test_values_are_transformers_own_and_stay_in_one_place() -> None:
    caches = Caches(rows=3)
    caches.run(16)
    before = caches.places
    for new_tokens in (16, 1, 1, 6):
        caches.run(new_tokens)
    assert caches.places == before


def test_rows_that_leave_give_their_memory_back() -> None:
    caches = Caches(rows=4)
    caches.run(9)
    whole = caches.places
    caches.keep([3, 1])
    assert all(left < 0.75 * before for (_, left), (_, before) in zip(caches.places, whole, strict=True))
    caches.run(1)
    caches.keep([1])
    caches.run(FINAL_TOKENS - 10)


def test_a_cache_that_has_seen_no_token_can_lose_rows() -> None:
    caches = Caches(rows=2)
    assert all(type(layer) is GrownLayer for layer in caches.placed.layers)
    caches.keep([0])
    caches.run(3)


def test_more_tokens_than_planned_are_refused() -> None:
    caches = Caches(rows=1)
    caches.run(FINAL_TOKENS)
    with pytest.raises(AssertionError, match=f"a cache for {FINAL_TOKENS} tokens was given {FINAL_TOKENS + 1}"):
        caches.run(1)
