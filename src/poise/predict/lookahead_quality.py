"""How good predictions of a layer's routing are: which experts of a token, and how many tokens of a step.

Letters: T tokens, K choices, J predicted, E experts. An expert of E or more is masked, and counts for nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.number[Any]]


def recall(predicted_TJ: Ints, true_TK: Ints, num_experts: int) -> float:
    """Share (0-1) of the true choices that are among the predicted, over all tokens."""
    real_TK = true_TK < num_experts
    found_TK = (true_TK[:, :, None] == predicted_TJ[:, None, :]).any(axis=2)
    return float((found_TK & real_TK).sum() / max(1, real_TK.sum()))


def counts_of(chosen_TK: Ints, num_experts: int) -> npt.NDArray[np.int64]:
    """How many of the tokens chose each expert, shape (E,)."""
    return np.bincount(np.minimum(chosen_TK, num_experts).ravel(), minlength=num_experts + 1)[:num_experts]


def misplaced_frac(predicted_E: Numbers, true_E: Numbers) -> float:
    """Share (0-1) of a step's assignments that are predicted at another expert: half the sum of differences."""
    total = max(1.0, float(np.sum(true_E)))
    return float(np.abs(np.asarray(predicted_E, dtype=float) - true_E).sum() / (2.0 * total))


def top_of(scores_TE: Numbers, count: int) -> npt.NDArray[np.int64]:
    """The ``count`` experts with the highest scores of each token, (T, count); equal ones in order of expert."""
    return np.argsort(-np.asarray(scores_TE), axis=1, kind="stable")[:, :count].astype(np.int64)
