"""Placements that are as uneven as one asks for: the same model and tokens at another imbalance.

Pure: numbers of tokens in, a placement without copies out. Letters: L layers, E experts, R ranks, N experts of a rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.spec.placement import Placement, as_slots

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def uneven(load_LE: Floats, *, ranks: int, imbalance: float) -> Placement:
    """One rank of each layer, another one in the next, has about ``imbalance`` times the mean of the ranks' tokens, or as many
    as the most popular experts bring; the others share the rest. E must divide by ``ranks``."""
    layers, experts = load_LE.shape
    assert experts % ranks == 0, f"{experts} experts do not divide by {ranks} ranks"
    rows = [
        _with_hot_rank(load_E, ranks, imbalance, hot=layer % ranks).reshape(-1) for layer, load_E in enumerate(load_LE)
    ]
    slots_LS = as_slots([row_S.tolist() for row_S in rows])
    return Placement(slot_to_expert_LS=slots_LS, layers=tuple(range(layers)), num_experts=experts, ranks=ranks)


def _with_hot_rank(load_E: Floats, ranks: int, imbalance: float, *, hot: int) -> Ints:
    """(R, N). From as even as it gets, experts change places with those of the busiest rank while that brings it nearer."""
    experts_RN = _as_even(load_E, ranks)
    busiest = int(load_E[experts_RN].sum(axis=1).argmax())
    wanted = imbalance * float(load_E.sum()) / ranks
    others = [rank for rank in range(ranks) if rank != busiest]
    for _ in range(len(load_E)):
        missing = wanted - float(load_E[experts_RN[busiest]].sum())
        gain_RNN = load_E[experts_RN[others]][:, :, None] - load_E[experts_RN[busiest]][None, None, :]
        rank, theirs, own = np.unravel_index(np.abs(missing - gain_RNN).argmin(), gain_RNN.shape)
        if abs(missing - gain_RNN[rank, theirs, own]) >= abs(missing):
            break
        given, taken = experts_RN[busiest, own], experts_RN[others[rank], theirs]
        experts_RN[busiest, own], experts_RN[others[rank], theirs] = taken, given
    return np.roll(experts_RN, hot - busiest, axis=0)


def _as_even(load_E: Floats, ranks: int) -> Ints:
    """The most popular first, each to the rank with the least that has room, (R, N)."""
    room = len(load_E) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_R = np.zeros(ranks)
    for expert in np.argsort(-load_E, kind="stable").tolist():
        rank = min((rank for rank in range(ranks) if len(held[rank]) < room), key=lambda rank: float(load_R[rank]))
        held[rank].append(expert)
        load_R[rank] += load_E[expert]
    return np.array(held)
