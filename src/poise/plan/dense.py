"""Which decoder layers' dense weights stay in memory, and which are streamed: the ways there are. Pure functions of numbers.

Layers that stream are spread evenly over the model, so that the disk has the layers between them to read the next in. Which
way is best depends on what else wants the memory: ``plan.pipeline`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_SLOTS = 2
"""One layer computes while the next is read."""
MAX_WAYS = 24
"""So many ways are told apart; of a model with more layers an even choice, the first and the last included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpec:
    """``total_bytes``: all dense weights. Per decoder layer l, ``bytes_L[l]`` of them can be streamed, through a slot of
    ``slot_bytes_L[l]``, which is a little more as reads are aligned.
    """

    total_bytes: int
    bytes_L: tuple[int, ...]
    slot_bytes_L: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DensePlan:
    """``streamed``: decoder layers whose dense weights are read in every pass, ascending, through ``NUM_SLOTS`` slots.

    ``memory_bytes`` is what dense weights take then: those that stay and the slots. ``bytes_per_pass`` is read.
    """

    streamed: tuple[int, ...]
    slot_bytes: int
    memory_bytes: int
    bytes_per_pass: int


def stream_layers(spec: DenseSpec, num_resident: int) -> DensePlan:
    """The plan that keeps ``num_resident`` decoder layers in memory; all of them where slots would take as much."""
    layers = [layer for layer, nbytes in enumerate(spec.bytes_L) if nbytes]
    count = len(layers) - min(max(num_resident - (len(spec.bytes_L) - len(layers)), 0), len(layers))
    streamed = tuple(layers[(place + 1) * len(layers) // count - 1] for place in range(count))
    slot_bytes = max((spec.slot_bytes_L[layer] for layer in streamed), default=0)
    moved = sum(spec.bytes_L[layer] for layer in streamed)
    if count <= NUM_SLOTS or moved <= NUM_SLOTS * slot_bytes:
        return DensePlan(streamed=(), slot_bytes=0, memory_bytes=spec.total_bytes, bytes_per_pass=0)
    memory_bytes = spec.total_bytes - moved + NUM_SLOTS * slot_bytes
    return DensePlan(streamed=streamed, slot_bytes=slot_bytes, memory_bytes=memory_bytes, bytes_per_pass=moved)


def dense_ways(spec: DenseSpec) -> tuple[DensePlan, ...]:
    """Plans that take less and less memory, from all layers in memory to as many streamed as pays; ``MAX_WAYS`` at most."""
    ways: list[DensePlan] = []
    for num_resident in range(len(spec.bytes_L), -1, -1):
        plan = stream_layers(spec, num_resident)
        if not ways or plan.memory_bytes < ways[-1].memory_bytes:
            ways.append(plan)
    last = len(ways) - 1
    count = min(len(ways), MAX_WAYS)
    return tuple(ways[round(place * last / max(1, count - 1))] for place in range(count))
