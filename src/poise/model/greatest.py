"""The greatest few of each row, compiled: several times as fast as ``torch.topk`` for rows as short as a router's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.plan.compiled import compiled


@compiled
def greatest_TK(logits_TE: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int64]:
    """Places of the ``top_k`` greatest of each row (C-contiguous), the greatest first; of equal ones the first."""
    tokens, experts = logits_TE.shape
    place_TK = np.empty((tokens, top_k), dtype=np.int64)
    value_K = np.empty(top_k, dtype=np.float32)
    for token in range(tokens):
        value_K[:] = -np.inf
        place_TK[token] = 0
        least = np.float32(-np.inf)
        for expert in range(experts):
            value = logits_TE[token, expert]
            if value <= least:
                continue
            k = top_k - 1
            while k > 0 and value_K[k - 1] < value:
                value_K[k], place_TK[token, k] = value_K[k - 1], place_TK[token, k - 1]
                k -= 1
            value_K[k], place_TK[token, k] = value, expert
            least = value_K[top_k - 1]
    return place_TK
