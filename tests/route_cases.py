"""Routes that tests compare."""

from __future__ import annotations

import torch

from poise.parallel.routes import Routes


def assert_alike(one: Routes, other: Routes) -> None:
    """The same rows, in the same order."""
    assert (one.sent_R, one.num_experts) == (other.sent_R, other.num_experts)
    torch.testing.assert_close(one.token_N, other.token_N, rtol=0, atol=0)
    torch.testing.assert_close(one.experts_NK, other.experts_NK, rtol=0, atol=0)
