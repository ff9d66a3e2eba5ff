"""What experts weigh: tokens of each slot and of each rank, and how many slots of a rank a step keeps active.

A slot gets an even share of its expert's tokens. Loads are means over steps, so a slot with a mean of w tokens is idle in
some: it is active in a share of 1 - exp(-w) of them, as if tokens came independently (Poisson).
Letters: L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def active_share(tokens: Floats) -> Floats:
    """Share (0-1) of the steps in which a slot with these mean tokens gets any."""
    return np.asarray(-np.expm1(-tokens))


def copies_of(slot_to_expert_LS: Ints, num_experts: int) -> Ints:
    """Slots that hold each expert; shape (L, E)."""
    num_layers = len(slot_to_expert_LS)
    flat = slot_to_expert_LS + num_experts * np.arange(num_layers)[:, None]
    return np.bincount(flat.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def slot_tokens(load_LE: Floats, slot_to_expert_LS: Ints) -> Floats:
    """Tokens of each slot: its expert's, split evenly over the expert's copies; shape (L, S)."""
    copies_LE = copies_of(slot_to_expert_LS, load_LE.shape[1])
    assert (copies_LE > 0).all(), "an expert has no place"
    return np.take_along_axis(load_LE / copies_LE, slot_to_expert_LS, axis=1)


def rank_loads(load_LE: Floats, slot_to_expert_LS: Ints, num_ranks: int) -> tuple[Floats, Floats]:
    """(tokens, active slots) of each rank in a step; shape (L, R) each."""
    tokens_LS = slot_tokens(load_LE, slot_to_expert_LS)
    by_rank = (len(tokens_LS), num_ranks, tokens_LS.shape[1] // num_ranks)
    return tokens_LS.reshape(by_rank).sum(axis=2), active_share(tokens_LS).reshape(by_rank).sum(axis=2)
