"""A model as it will run on one of several ranks, before any of its weights is read: ``engine.blueprint``, and what ranks add.

Who holds which expert at first, what experts cost on each rank, what balances them, and what a rank takes in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from poise.engine.balances import AUTO, Balances
from poise.engine.blueprint import Blueprint, Options, draw_up
from poise.engine.first_placement import contiguous_for, curves_of, device_of, digest_of, opened, placed_by_speed
from poise.engine.lookahead_use import LookaheadUse
from poise.engine.probe import Probed
from poise.engine.rank_device import budget_for, carrier_for, device_for
from poise.engine.vibe import Vibe
from poise.errors import UsageError
from poise.model.int4_making import OnMade
from poise.model.lookahead_training import WIDTH
from poise.parallel.carrier import Carrier
from poise.parallel.launch import Launch
from poise.parallel.rank_experts import shard_bytes
from poise.parallel.replica_slots import replica_bytes
from poise.parallel.step_options import StepOptions
from poise.plan.rank_costs import RankCosts
from poise.plan.rebalance import Rebalance
from poise.spec.machine import Machine
from poise.spec.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """How a model is to run on ranks: the parameters of ``ParallelLLM`` of the same names, where they are explained."""

    memory: str | int = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    machine: Machine | str | Path | None = None
    balance: str = AUTO
    policy: Rebalance | None = None
    steps: StepOptions | None = None
    redundant_slots: int | None = None
    placement: Placement | None = None
    groups: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBlueprint:
    """``drawn``: the model as one process would have it, ``blueprint``: the same with what this rank takes. ``placement``: who
    holds which expert at first. ``curves``: what experts cost on each rank, where that was measured. ``compared``: options that
    must be the same on all ranks."""

    balances: Balances
    device: torch.device
    carrier: Carrier
    drawn: Blueprint
    blueprint: Blueprint
    placement: Placement
    curves: RankCosts | None
    compared: Mapping[str, object]

    @property
    def shard_bytes(self) -> int:
        """What this rank's experts take, with spare slots and those of replicas."""
        return shard_bytes_of(self.blueprint, self.placement, replica_slots=self.balances.replica_slots)

    def corrected(self, probed: Probed) -> RankBlueprint:
        """The same with what forwards of the loaded model showed."""
        drawn = self.drawn.corrected(probed)
        planned = for_ranks(drawn, self.placement, replica_slots=self.balances.replica_slots)
        return replace(self, drawn=drawn, blueprint=planned)


def draw_up_for_rank(
    model: str | Path, launch: Launch, options: RankOptions, *, on_made: OnMade | None
) -> RankBlueprint:
    """Raises UsageError (CheckpointError, MachineError, BudgetError) for what cannot run."""
    device = _device(options, launch)
    balances = Balances.of(
        options.balance, options.policy, options.steps, num_ranks=launch.num_ranks, device=device.type
    )
    lookahead = _lookahead(balances.steps)
    redundant_slots = balances.redundant_slots if options.redundant_slots is None else options.redundant_slots
    machine = opened(options.machine)
    carrier = carrier_for(device, launch)
    asked = Options(
        memory=budget_for(options.memory, device, local_ranks=launch.local_ranks),
        device=device.type,
        dtype=options.dtype,
        groups=options.groups,
        quantize=options.quantize,
        machine=device_of(machine, launch.rank),
        lookahead=lookahead,
        experts_stay=True,
    )
    drawn = draw_up(model, asked, on_made=on_made or _nobody, waits=True)
    first = options.placement or contiguous_for(drawn, launch.num_ranks, redundant_slots)
    curves = None
    if machine is not None and balances.uses_speed:
        curves = curves_of(machine, drawn, launch.num_ranks)
        if options.placement is None and isinstance(balances.policy, Vibe):
            first = placed_by_speed(first, curves, top_k=drawn.spec.top_k)
    return RankBlueprint(
        balances=balances,
        device=device,
        carrier=carrier,
        drawn=drawn,
        blueprint=for_ranks(drawn, first, replica_slots=balances.replica_slots),
        placement=first,
        curves=curves,
        compared={
            "dtype": drawn.dtype.dtype,
            "quantize": options.quantize,
            "device": device.type,
            "exchanges": carrier,
            "machine": digest_of(machine),
            "redundant slots": redundant_slots,
            "balance": balances.policy or "static",
            "steps": "as they are" if balances.steps is None else replace(balances.steps, lookahead=None),
            "lookahead": _digest_of(lookahead),
        },
    )


def _lookahead(steps: StepOptions | None) -> LookaheadUse | None:
    """What asks routers a layer early, where steps are balanced by that."""
    if steps is None or steps.predictor != "gate":
        return None
    width = WIDTH if steps.online and steps.lookahead is None else None
    return LookaheadUse(width=width, file=steps.lookahead, online=steps.online)


def _digest_of(use: LookaheadUse | None) -> str:
    """That ranks compare: of what the file holds, as each host may keep it elsewhere. It was read before."""
    if use is None or use.file is None:
        return "none"
    return hashlib.sha256(use.file.read_bytes()).hexdigest()[:12]


def _device(options: RankOptions, launch: Launch) -> torch.device:
    """Where this rank computes. Raises UsageError for what does not run there."""
    device = device_for(options.device, launch)
    if device.type == "cuda" and options.quantize != "none":
        raise UsageError("quantize 'int4' is computed on CPUs only; leave it out, or give device cpu")
    return device


def shard_bytes_of(drawn: Blueprint, placement: Placement, *, replica_slots: int = 0) -> int:
    """What a rank's experts take, with the spare slots of one layer, into which experts move, and those of replicas."""
    shard = shard_bytes(drawn.layout.experts_LE, placement, spare_slots=placement.slots_per_rank)
    return shard + replica_bytes(drawn.layout.experts_LE, replica_slots)


def for_ranks(drawn: Blueprint, placement: Placement, *, replica_slots: int = 0) -> Blueprint:
    """The same with what a rank takes: all dense weights in memory, its experts, and the tokens that others may send it.

    In the worst case all ranks' tokens come to one of them; activations are planned for that.
    """
    drawn = replace(drawn, layout=drawn.layout.unpacked())
    pipeline = drawn.pipeline
    local = min(drawn.spec.top_k, placement.slots_per_rank)
    planned = replace(
        pipeline,
        spec=replace(pipeline.spec, experts_L=(placement.slots_per_rank,) * len(placement.layers)),
        activation=replace(pipeline.activation, top_k=pipeline.activation.top_k + placement.ranks * (local + 6)),
        dense=pipeline.dense[:1],
        slot_bytes=1,  # experts count as scratch: they are there, whatever is planned
        scratch_bytes=pipeline.scratch_bytes + shard_bytes_of(drawn, placement, replica_slots=replica_slots),
        max_slots=None,
        may_move_cache=(False,),
        wants_large_passes=True,  # of exchanges, which the time model does not know
    )
    return replace(drawn, pipeline=planned)


def _nobody(done: int, total: int) -> None:
    """Is told of a 4-bit store that is made, where rank 0 shows it."""
