"""Where experts lie before the first pass: as every engine starts, or by the speeds of devices that were measured before."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from poise.engine.blueprint import Blueprint
from poise.errors import UsageError
from poise.plan.placement import place_on
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import RankCosts
from poise.profile.subject import Subject
from poise.spec.machine import Machine
from poise.spec.placement import Placement, contiguous

STEP_TOKENS = 64
"""Of each rank in a pass, for a placement that nothing else is known for: a decode pass of many sequences."""


def opened(machine: Machine | str | Path | None) -> Machine | None:
    """Raises MachineError for a file that cannot be read."""
    return machine if machine is None or isinstance(machine, Machine) else Machine.load(Path(machine))


def digest_of(machine: Machine | None) -> str:
    """That ranks compare."""
    return "none" if machine is None else hashlib.sha256(repr(machine).encode()).hexdigest()[:12]


def device_of(machine: Machine | None, rank: int) -> Machine | None:
    """The machine of one rank alone; devices are repeated where there are more ranks."""
    if machine is None:
        return None
    return replace(machine, devices=(machine.devices[rank % len(machine.devices)],), links=())


def curves_of(machine: Machine, drawn: Blueprint, num_ranks: int) -> RankCosts:
    """What experts cost on each rank. Raises MachineError for ranks or experts that the machine has no curves for."""
    subject = Subject(
        name=drawn.spec.architecture, model=drawn.model, modules=tuple(drawn.modules), dtype=drawn.dtype.dtype
    )
    return RankCosts.of_machine(machine, ranks=num_ranks, shape=subject.expert_shape)


def contiguous_for(drawn: Blueprint, num_ranks: int, redundant_slots: int) -> Placement:
    """Experts in their order, with so many further slots on each rank. Raises UsageError where that cannot be."""
    experts = max(drawn.spec.experts_L)
    if min(drawn.spec.experts_L) != experts:
        raise UsageError(f"{drawn.spec.architecture} has layers of different numbers of experts; run it without ranks")
    if redundant_slots < 0:
        raise UsageError(f"redundant slots are {redundant_slots}; give 0 or more")
    slots = min(experts, -(-experts // num_ranks) + redundant_slots)
    return contiguous(drawn.spec.moe_layers, num_experts=experts, ranks=num_ranks, slots_per_rank=slots)


def placed_by_speed(placement: Placement, curves: RankCosts, *, top_k: int) -> Placement:
    """The same slots filled so that ranks of these speeds finish together if all experts get like numbers of tokens."""
    pairs = STEP_TOKENS * placement.ranks * top_k
    load_LE = np.full((1, placement.num_experts), pairs / placement.num_experts)
    request = PlacementRequest(load_LE=load_LE, num_ranks=placement.ranks, slots_per_rank=placement.slots_per_rank)
    row_S = place_on(request, curves, expert_bytes=1).slot_to_expert_LS[0].astype(np.int32)
    return replace(placement, slot_to_expert_LS=np.tile(row_S, (len(placement.layers), 1)))
