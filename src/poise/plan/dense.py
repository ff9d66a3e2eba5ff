"""How many decoder layers' dense weights stay in memory, and which are streamed. Pure functions of numbers.

A byte of dense weights in memory saves a byte read in every pass, as much as an expert's byte does at best, so dense layers
stay as long as a quarter of the room is left for experts, caches and activations. Those that stream are spread evenly over
the model, so that the disk has the layers between them to read the next in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

NUM_SLOTS = 2
"""One layer computes while the next is read."""
DENSE_FRAC = 0.75
"""Share of the room that dense weights may take before layers are streamed."""


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


def plan_dense(spec: DenseSpec, *, room_bytes: int) -> DensePlan:
    """As many layers in memory as ``DENSE_FRAC`` of the room holds; where not even the smallest plan does, the smallest."""
    plans = list(_plans(spec))
    return next((plan for plan in plans if plan.memory_bytes <= room_bytes * DENSE_FRAC), plans[-1])


def smallest_plan(spec: DenseSpec) -> DensePlan:
    """The plan that takes least memory."""
    *_, last = _plans(spec)
    return last


def smallest_room_bytes(spec: DenseSpec, working_bytes: int) -> int:
    """The smallest room in which ``plan_dense`` leaves ``working_bytes`` beside the dense weights."""
    plans = list(_plans(spec))
    # plan_dense chooses plan p where the room is at least least_P[p] and less than that of the plan before.
    least_P = [math.ceil(plan.memory_bytes / DENSE_FRAC) for plan in plans[:-1]] + [0]
    rooms_P = [max(least, plan.memory_bytes + working_bytes) for plan, least in zip(plans, least_P, strict=True)]
    return min(room for place, room in enumerate(rooms_P) if place == 0 or room < least_P[place - 1])


def _plans(spec: DenseSpec) -> Iterator[DensePlan]:
    """Plans that take less and less memory, from all layers in memory to as many streamed as pays."""
    last: DensePlan | None = None
    for num_resident in range(len(spec.bytes_L), -1, -1):
        plan = stream_layers(spec, num_resident)
        if last is None or plan.memory_bytes < last.memory_bytes:
            yield plan
            last = plan
