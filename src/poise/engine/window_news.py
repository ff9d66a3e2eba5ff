"""What ranks tell each other about a window of passes, as one row of numbers each, and what it says when put together.

A row: choices of the rank's own tokens by layer and expert, then the layers it computed (tokens, experts, seconds, waiting),
then sums. All ranks run the same layers in the same order, so that rows of one number belong together.
Letters: L layers, E experts, N layers computed, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.parallel.moe_layer import LayerRecord
from poise.plan.observed_costs import Times

Floats = npt.NDArray[np.float64]
_EACH = 4
"""Numbers of a layer that was computed."""
_SUMS = 3
"""How many layers there are, bytes sent, and what moving an expert takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowFigures:
    """What a window of passes was like. ``imbalance``: most tokens of a rank over the mean, mean over layers and passes;
    ``expert_s_R``: time in experts of each rank, ``waited_s_R``: waiting for the last one; ``sent_bytes``: by all.

    ``slowest_s``: the slowest rank's time in each layer, summed up: what a better placement could shorten. ``pairs``: (token,
    expert) pairs that were computed.
    """

    last_pass: int
    imbalance: float
    expert_s_R: tuple[float, ...]
    waited_s_R: tuple[float, ...]
    sent_bytes: int
    slowest_s: float
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WindowNews:
    """``move_s``: of an expert, on the rank that takes longest for one."""

    load_LE: Floats
    times: Times
    figures: WindowFigures
    move_s: float


def told(
    records: Sequence[LayerRecord], counts_LE: npt.NDArray[np.int64], *, most_records: int, move_s: float
) -> Floats:
    """A rank's row, of the same length whatever happened: at most ``most_records`` layers, the last ones."""
    kept = records[len(records) - min(len(records), most_records) :]
    each_N4 = np.zeros((most_records, _EACH))
    for place, record in enumerate(kept):
        each_N4[place] = record.routed_tokens, record.active_experts, record.compute_s, record.waited_s
    sums = [len(kept), sum(record.sent_bytes for record in records), move_s]
    return np.concatenate([counts_LE.ravel().astype(float), each_N4.ravel(), sums])


def heard(told_RN: Floats, *, layers: int, experts: int, last_pass: int) -> WindowNews:
    """All ranks' rows put together."""
    counted = layers * experts
    each_RN4 = told_RN[:, counted:-_SUMS].reshape(len(told_RN), -1, _EACH)
    count_R, sent_R, move_R = told_RN[:, -_SUMS:].T
    each_RN4 = each_RN4[:, : int(count_R.min())]
    tokens_NR, active_NR, seconds_NR, waited_NR = each_RN4.transpose(2, 1, 0)
    times = Times(tokens_NR=tokens_NR, active_NR=active_NR, seconds_NR=seconds_NR)
    return WindowNews(
        load_LE=told_RN[:, :counted].sum(axis=0).reshape(layers, experts),
        times=times,
        figures=WindowFigures(
            last_pass=last_pass,
            imbalance=_imbalance(tokens_NR),
            expert_s_R=tuple(seconds_NR.sum(axis=0).tolist()),
            waited_s_R=tuple(waited_NR.sum(axis=0).tolist()),
            sent_bytes=int(sent_R.sum()),
            slowest_s=times.slowest_s(),
            pairs=int(tokens_NR.sum()),
        ),
        move_s=float(move_R.max()),
    )


def _imbalance(tokens_NR: Floats) -> float:
    """Most over mean, mean over the layers that had tokens."""
    mean_N = tokens_NR.mean(axis=1)
    busy = mean_N > 0
    return float((tokens_NR.max(axis=1)[busy] / mean_N[busy]).mean()) if busy.any() else 1.0
