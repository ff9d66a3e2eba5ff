"""Who wants to know where a pass sends its tokens: the recorder, the prefetcher. Nobody listens unless asked to.

A listener is told of every MoE layer when all batches of the group have parked there, before the experts compute; an aborted
pass ends anywhere, and the next begins at layer 0 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from poise.model.seam import Parked

Ints = npt.NDArray[np.int64]


class RoutingListener(Protocol):
    """``chosen_TK``: what the real tokens of all batches chose, in the same order at every layer of a pass.

    ``layer`` is the position among the MoE layers. A choice at or above the layer's number of experts is masked.
    """

    def on_layer(self, layer: int, chosen_TK: Ints) -> None: ...


class SeamListener(Protocol):
    """One that wants to know what was seen where a choice was made: the lookahead predictor, and what teaches it.

    ``hidden_TH``: the hidden states of the same real tokens, in the same order, made in inference mode; they hold until the
    call returns.
    """

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None: ...


def hidden_TH(parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The hidden states of all real tokens of a group, one batch below the other."""
    states = [
        entry.hidden_TH if mask is None else entry.hidden_TH[mask] for entry, mask in zip(parked, real, strict=True)
    ]
    return states[0] if len(states) == 1 else torch.cat(states)


def choices_TK(parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> Ints:
    """The choices of all real tokens of a group, one batch below the other."""
    chosen = [
        entry.top_k_index_TK if mask is None else entry.top_k_index_TK[mask]
        for entry, mask in zip(parked, real, strict=True)
    ]
    return np.concatenate([each.numpy(force=True) for each in chosen]).astype(np.int64, copy=False)
