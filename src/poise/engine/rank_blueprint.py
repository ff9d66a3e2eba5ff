"""A model as it will run on one of several ranks, before any of its weights is read."""

from __future__ import annotations

from dataclasses import replace

from poise.engine.blueprint import Blueprint
from poise.parallel.rank_experts import shard_bytes
from poise.parallel.replica_slots import replica_bytes
from poise.spec.placement import Placement


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
    )
    return replace(drawn, pipeline=planned)
