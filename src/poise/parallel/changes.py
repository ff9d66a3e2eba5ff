"""From one placement to another in steps that ranks take together: layer by layer, who gets which expert from where.

Pure: placements in, frozen steps out, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from poise.spec.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """``expert`` comes to ``to_rank`` from ``from_rank``."""

    expert: int
    to_rank: int
    from_rank: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerChange:
    """What one MoE layer (by position) looks like afterwards, and what must arrive first."""

    layer: int
    slot_to_expert_S: npt.NDArray[np.int32]
    arrivals: tuple[Arrival, ...]


def changes_between(before: Placement, after: Placement) -> tuple[LayerChange, ...]:
    """One change for each layer that differs. Of several ranks that have an expert the one that sends least in this layer sends
    it.
    """
    assert (before.ranks, before.layers) == (after.ranks, after.layers), "two placements of different jobs"
    assert before.slots_per_rank == after.slots_per_rank, "ranks keep as many slots as they have"
    rows = zip(before.slot_to_expert_LS, after.slot_to_expert_LS, strict=True)
    return tuple(
        LayerChange(layer=layer, slot_to_expert_S=new_S, arrivals=_arrivals(old_S, new_S, before.ranks))
        for layer, (old_S, new_S) in enumerate(rows)
        if not np.array_equal(old_S, new_S)
    )


def ranks_of(slot_to_expert_S: npt.NDArray[np.int32], num_ranks: int) -> list[set[int]]:
    """The experts of each rank."""
    return [set(row.tolist()) for row in slot_to_expert_S.reshape(num_ranks, -1)]


def _arrivals(old_S: npt.NDArray[np.int32], new_S: npt.NDArray[np.int32], num_ranks: int) -> tuple[Arrival, ...]:
    old_R, new_R = ranks_of(old_S, num_ranks), ranks_of(new_S, num_ranks)
    sends_R = [0] * num_ranks
    arrivals = []
    for rank in range(num_ranks):
        for expert in sorted(new_R[rank] - old_R[rank]):
            source = min(
                (other for other in range(num_ranks) if expert in old_R[other]), key=lambda other: sends_R[other]
            )
            sends_R[source] += 1
            arrivals.append(Arrival(expert=expert, to_rank=rank, from_rank=source))
    return tuple(arrivals)
