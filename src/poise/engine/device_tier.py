"""A device whose memory the model does not fit: what lies on it, and what DRAM and the disk hold behind it.

Dense weights and what is computed are on the device, keys and values there or in DRAM; experts come to slots there from DRAM,
which holds all of them where its own budget allows, else those needed next. With a budget for the device the CPU may play it.
Not here: choosing batches and slots (``plan.pipeline``), copying (``offload.device_loader``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from poise.cost.layer_costs import RooflineCosts
from poise.engine.footprint import AUTO_MARGIN_FRAC
from poise.engine.planning import Costs, on_accelerator
from poise.engine.prefetcher import prefetcher_bytes
from poise.errors import BudgetError, UsageError
from poise.model.device_weights import device_slot_bytes_for
from poise.model.layout import CheckpointLayout
from poise.model.weights import Convert, slot_bytes_for, staging_bytes_for
from poise.offload.device_loader import DeviceLoader
from poise.offload.expert_store import ExpertStore
from poise.offload.host_tier import HostTier
from poise.offload.kv_places import DramPlace
from poise.offload.kv_stream import KvStream
from poise.offload.lanes import lane_to
from poise.plan.candidates import DEVICE_NUM_BATCHES, DEVICE_PASS_TOKENS, PipelineModel
from poise.plan.memory import OVERHEAD_BYTES
from poise.profile.accelerator import accelerator_rates
from poise.spec.model_spec import CacheSpec, ModelSpec
from poise.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from poise.engine.blueprint import Options

WINDOW_LAYERS = 2
"""Klotski's L: where DRAM is short, so many layers' experts may be read before the device fetches them."""
WANTED_SLOTS = 2
"""On the device, where they fit at all: one is computed with while the next is copied. With one the bus idled for a fifth of a
decode pass (H200, experts of 6.5 ms). More are planned where they pay."""
CACHE_FRAC = 0.9
"""Of what is left of DRAM, that caches may be planned to take: they lie in whole pages, each token in whole lines."""
DISK_BYTES_PER_S = 1e9
"""What plans take the disk for, where DRAM is short: it is not measured yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTier:
    """``budget_bytes``: of the device. ``slot_bytes``: an expert there. ``host_slots``: experts in DRAM, and their bytes.
    ``cache_bytes``: room for caches beside them."""

    device: torch.device
    budget_bytes: int
    slot_bytes: int
    host_slots: int
    host_slot_bytes: int
    cache_bytes: int

    def may_move_cache(self, options: Options, cache: CacheSpec) -> tuple[bool, ...]:
        """Where caches may be planned: False on the device, True in DRAM."""
        can_move = cache.movable_bytes_per_token > 0 and self.cache_bytes > 0 and options.kv_on_disk is not False
        return (False, True) if can_move else (False,)


def tier_device(options: Options) -> torch.device | None:
    """The device that experts are copied to; None: they compute in the memory that they are read into.

    Raises UsageError for options that do not go with one, and for a GPU that is not there.
    """
    if options.experts_stay or (options.device != "cuda" and options.device_memory is None):
        return None
    refused = (
        ("quantize int4", options.quantize != "none", "4-bit experts are computed on the CPU"),
        ("kv_on_disk", bool(options.kv_on_disk), "keys and values lie on the device or in DRAM"),
        ("dense_layers", options.dense_layers is not None, "all dense weights stay on the device"),
        ("a lookahead predictor", options.lookahead is not None, "predictors run on the CPU"),
        ("a machine file", options.machine is not None, "the device is measured when a model is opened"),
    )
    for what, is_asked, reason in refused:
        if is_asked:
            raise UsageError(f"{what} does not go with device memory: {reason}; leave it out, or compute on the CPU")
    if options.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("device 'cuda', but this host has no GPU that torch can use; give device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def device_budget_bytes(asked: str | int | None, device: torch.device) -> int:
    """What may lie on the device. ``auto`` or None: what is free there, less a margin."""
    if asked is not None and asked != "auto":
        return parse_bytes(asked)
    if device.type != "cuda":
        raise UsageError("device memory 'auto' needs a GPU; give a size, such as 2GiB")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes * (1.0 - AUTO_MARGIN_FRAC))


def draw_tier(options: Options, device: torch.device, layout: CheckpointLayout, *, memory_bytes: int) -> DeviceTier:
    """``memory_bytes``: the budget of DRAM. Raises BudgetError where not even one expert fits there."""
    experts_LE = layout.experts_LE
    slot_bytes = -(-slot_bytes_for(experts_LE) // 4096) * 4096
    fixed_bytes = OVERHEAD_BYTES + staging_bytes_for(experts_LE, under_way=3) + prefetcher_bytes(experts_LE)
    room = memory_bytes - fixed_bytes
    if room < slot_bytes:
        needed = fixed_bytes + slot_bytes
        raise BudgetError(
            f"a memory budget of {format_bytes(memory_bytes)} is too small; the smallest that works is {needed} bytes "
            f"({format_bytes(needed)}): one expert of {format_bytes(slot_bytes)} on its way to the device, and what reads it",
            smallest_bytes=needed,
        )
    host_slots = min(sum(map(len, experts_LE)), room // slot_bytes)
    return DeviceTier(
        device=device,
        budget_bytes=device_budget_bytes(options.device_memory, device),
        slot_bytes=device_slot_bytes_for(experts_LE),
        host_slots=host_slots,
        host_slot_bytes=slot_bytes,
        cache_bytes=int((room - host_slots * slot_bytes) * CACHE_FRAC),
    )


def on_device(pipeline: PipelineModel, tier: DeviceTier, config: Any, options: Options) -> PipelineModel:
    """The same model where all but experts is on the device: all its dense weights, and caches, unless they are in DRAM.

    ``config``: transformers'.
    """
    return replace(
        pipeline,
        activation=on_accelerator(pipeline.activation, config),
        dense=pipeline.dense[:1],
        slot_bytes=tier.slot_bytes,
        scratch_bytes=0,
        may_move_cache=tier.may_move_cache(options, pipeline.cache),
        most_moved_bytes=tier.cache_bytes,
        num_batches=DEVICE_NUM_BATCHES,
        pass_tokens=DEVICE_PASS_TOKENS if tier.device.type == "cuda" else pipeline.pass_tokens,
        wanted_slots=WANTED_SLOTS,
        under_way=0,
        budget_name="device memory budget",
    )


def device_costs(tier: DeviceTier, spec: ModelSpec, dtype: torch.dtype, layout: CheckpointLayout) -> Costs:
    """Times on the device, and as the disk's rate that at which experts come to it, by way of the slower tier.

    A GPU is measured with the largest of an expert's matrices.
    """
    rates = accelerator_rates(tier.device, dtype, shape=max(layout.experts_LE[0][0].shapes.values(), key=math.prod))
    num_experts = sum(spec.experts_L)
    from_disk = num_experts - tier.host_slots
    supply = rates.copy_bytes_per_s
    if from_disk:
        supply = min(supply, DISK_BYTES_PER_S * num_experts / from_disk)
    head_bytes = spec.hidden * spec.vocabulary * dtype.itemsize
    layers = RooflineCosts(
        expert_bytes=spec.expert_bytes,
        attention_bytes=max(0, spec.dense_bytes - 2 * head_bytes) // spec.num_layers,
        head_bytes=head_bytes,
        itemsize=dtype.itemsize,
        expert_itemsize=dtype.itemsize,
        flops_per_s=rates.flops_per_s,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        disk_bytes_per_s=supply,
        launch_s=rates.launch_s,
    )
    return Costs(layers=layers, source=rates.source)


def open_device_kv(tier: DeviceTier) -> KvStream:
    """Caches that lie in DRAM while other batches compute on the device."""
    return KvStream(DramPlace(lane_to(tier.device), tier.device))


def open_device_store(tier: DeviceTier, layout: CheckpointLayout, convert: Convert, *, readers: int) -> ExpertStore:
    """A store on the device with one slot in service, over DRAM, over the disk."""
    experts_L = [len(row) for row in layout.experts_LE]
    host = HostTier(
        layout.experts_LE,
        num_slots=tier.host_slots,
        slot_bytes=tier.host_slot_bytes,
        reader_threads=readers,
        convert=convert,
        ahead=max(1, min(tier.host_slots // 2, WINDOW_LAYERS * max(experts_L))),
        is_pinned=tier.device.type == "cuda",
    )
    loader = DeviceLoader(host, lane_to(tier.device), tier.device, slot_bytes=tier.slot_bytes)
    store = ExpertStore(experts_L, loader, num_slots=0)
    store.resize(1)
    return store
