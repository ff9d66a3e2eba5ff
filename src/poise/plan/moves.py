"""What changes between two placements: which expert's weights go to which slot, and from where.

Letters: L layers, S slots, R ranks, E experts, M moves. Rank r owns the slots r * S / R to (r + 1) * S / R - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.plan.compiled import compiled

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moves:
    """Move m writes expert ``expert_M[m]`` of layer ``layer_M[m]`` into ``slot_M[m]``, read from ``source_slot_M[m]``.

    The sources are slots of the placement before. A source may itself be written by another move: read before writing.
    ``local_M``: the source is on the same rank, so that no link carries it. ``expert_bytes``: of each move.
    """

    layer_M: Ints
    expert_M: Ints
    slot_M: Ints
    source_slot_M: Ints
    local_M: npt.NDArray[np.bool_]
    expert_bytes: int

    def __len__(self) -> int:
        """Experts that come to a rank that did not have them: what ``max_moves`` limits."""
        return int(np.count_nonzero(~self.local_M))

    @property
    def nbytes(self) -> int:
        """Bytes that cross between ranks."""
        return len(self) * self.expert_bytes


def moves_between(before_LS: Ints, after_LS: Ints, *, num_ranks: int, ranks_per_node: int, expert_bytes: int) -> Moves:
    """The moves that turn one placement into the other.

    An expert comes from a copy on the same rank, else on the same node, else from the copy with the lowest slot.
    """
    layer_M, slot_M = np.nonzero(before_LS != after_LS)
    expert_M = after_LS[layer_M, slot_M]
    slots_per_rank = before_LS.shape[1] // num_ranks
    rank_S = np.arange(before_LS.shape[1]) // slots_per_rank
    rank_M = rank_S[slot_M]
    has_MS = before_LS[layer_M] == expert_M[:, None]
    assert has_MS.any(axis=1).all(), "the placement before lacks an expert"
    same_node_MS = rank_S[None, :] // ranks_per_node == (rank_M // ranks_per_node)[:, None]
    near_MS = 1 + same_node_MS.astype(np.int8) + (rank_S[None, :] == rank_M[:, None])
    source_slot_M = np.argmax(np.where(has_MS, near_MS, 0), axis=1)
    return Moves(
        layer_M=layer_M,
        expert_M=expert_M,
        slot_M=slot_M,
        source_slot_M=source_slot_M,
        local_M=rank_S[source_slot_M] == rank_M,
        expert_bytes=expert_bytes,
    )


@compiled
def keep_slots(before_LS: Ints, after_LS: Ints, num_ranks: int) -> Ints:
    """``after_LS`` with the slots of each rank in another order: experts that stay on a rank keep their slot."""
    num_layers, num_slots = after_LS.shape
    slots_per_rank = num_slots // num_ranks
    kept_LS = np.full((num_layers, num_slots), -1, dtype=np.int64)
    for layer in range(num_layers):
        for first in range(0, num_slots, slots_per_rank):
            placed = np.zeros(slots_per_rank, dtype=np.bool_)
            for slot in range(first, first + slots_per_rank):
                for index in range(slots_per_rank):
                    if not placed[index] and after_LS[layer, first + index] == before_LS[layer, slot]:
                        kept_LS[layer, slot] = before_LS[layer, slot]
                        placed[index] = True
                        break
            index = 0
            for slot in range(first, first + slots_per_rank):
                if kept_LS[layer, slot] < 0:
                    while placed[index]:
                        index += 1
                    kept_LS[layer, slot] = after_LS[layer, first + index]
                    placed[index] = True
    return kept_LS
