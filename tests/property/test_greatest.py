"""The greatest logits of each token are what ``torch.topk`` finds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.model.greatest import greatest_TK


@settings(deadline=None)  # loops are compiled once
@given(st.integers(0, 9), st.integers(1, 12), st.data())
def test_the_greatest_come_first_and_of_equal_ones_the_first(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k, seed = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 2**32 - 1))
    logits_TE = np.random.default_rng(seed).integers(-4, 4, (tokens, experts)).astype(np.float32)
    found_TK = greatest_TK(logits_TE, top_k)
    expected = torch.from_numpy(logits_TE).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    np.testing.assert_array_equal(found_TK, expected.numpy())
