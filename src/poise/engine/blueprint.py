"""A model as it will run, before any of its weights is read: what it is, what it takes, what it costs on this machine.

``LLM`` loads from a blueprint; `poise plan` plans with one and loads nothing. Drawing it up reads the checkpoint's headers,
builds the model on the meta device, and measures the machine if that was not done before. What cannot run is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from poise.engine.batch import Row
from poise.engine.companions import end_tokens, load_tokenizer
from poise.engine.dense_weights import DenseLayers, find_dense_layers
from poise.engine.device_tier import DeviceTier, device_costs, draw_tier, on_device, tier_device
from poise.engine.dtype import DtypeChoice, choose_for_device
from poise.engine.footprint import automatic_budget_bytes, reset_peak, resident_bytes
from poise.engine.kv_file import can_hold_kv
from poise.engine.lookahead_use import LookaheadUse, kept_weights, lookahead_bytes, width_of
from poise.engine.planning import (
    ORDINARY,
    SHORTEST,
    UNKNOWN,
    Costs,
    KnownRouting,
    activation_spec,
    layer_costs,
    measured_machine,
    model_spec,
    routing_of,
    workload_of,
)
from poise.engine.prefetcher import prefetcher_bytes, read_table
from poise.engine.probe import Probed, probe_ahead
from poise.engine.prompts import token_ids
from poise.engine.quantize import experts_in_4_bits, layout_in_4_bits
from poise.engine.request import QUANTIZATIONS, Prompt
from poise.engine.sampling import SamplingParams
from poise.errors import BudgetError, UsageError
from poise.model.cache import needs_whole_prompts
from poise.model.checkpoint import Checkpoint
from poise.model.dense import dense_nbytes, take_out_experts
from poise.model.hub import find_checkpoint
from poise.model.inspect import ExpertsModule, build_meta_model, choose_dtype, find_experts, load_config, own_dtype
from poise.model.int4_making import OnMade
from poise.model.int4_store import Int4Store
from poise.model.layout import CheckpointLayout, find_layout
from poise.model.lookahead_sites import RouterSite, find_sites
from poise.model.weights import int4_scratch_bytes_for, slot_bytes_for, staging_bytes_for, unpacked_if_it_fits
from poise.offload.unpacker import ring_bytes_for
from poise.plan.candidates import PipelineModel
from poise.plan.dense import DensePlan
from poise.plan.memory import OVERHEAD_BYTES
from poise.plan.pipeline import PipelinePlan, plan_pipeline
from poise.plan.workload import Workload
from poise.predict.correlation import CorrelationTable
from poise.spec.machine import Machine
from poise.spec.model_spec import ModelSpec
from poise.units import parse_bytes

READER_THREADS = 2
DEVICES = ("auto", "cpu", "cuda")
"""``auto`` is the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a model is to run; the parameters of ``LLM`` of the same names, where they are explained.

    Raises UsageError for values that no model can run with.
    """

    memory: str | int = "auto"
    device: str = "auto"
    device_memory: str | int | None = None
    dtype: str = "auto"
    quantize: str = "none"
    expert_slots: int | None = None
    dense_layers: int | None = None
    kv_on_disk: bool | None = None
    machine: Machine | str | Path | None = None
    groups: Sequence[tuple[int, int]] | None = None
    scratch_directory: str | Path | None = None
    correlation_table: str | Path | None = None
    trace: str | Path | None = None
    lookahead: LookaheadUse | None = None
    experts_stay: bool = False
    """On ranks: all experts of one are in its memory, so that it may be a GPU's."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(f"device {self.device!r} is not known; give one of {', '.join(DEVICES)}")
        if self.quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize {self.quantize!r} is not supported; choose one of {', '.join(QUANTIZATIONS)}")
        if self.expert_slots is not None and self.expert_slots < 1:
            raise UsageError(f"expert_slots is {self.expert_slots}; it must be at least 1, or left out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """``model`` lies on the meta device, its experts taken out, until it is loaded in place; all else does not change.

    ``base_bytes``: what the process held before anything that the budget counts. ``end_tokens``: they end a sequence.
    ``sites``: its routers, where there is a lookahead. ``tier``: the device that experts are copied to, if they are; then the
    budget is that of DRAM, and ``pipeline`` what lies on the device.
    """

    options: Options
    checkpoint: Checkpoint
    model: Any
    modules: Sequence[ExpertsModule]
    layout: CheckpointLayout
    int4: Int4Store | None
    dtype: DtypeChoice
    tokenizer: Any
    end_tokens: frozenset[int]
    table: CorrelationTable | None
    sites: tuple[RouterSite | None, ...]
    budget_bytes: int
    base_bytes: int
    dense: DenseLayers
    pipeline: PipelineModel
    costs: Costs
    routing: KnownRouting
    tier: DeviceTier | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu") if self.tier is None else self.tier.device

    @property
    def spec(self) -> ModelSpec:
        """The model in numbers."""
        return self.pipeline.spec

    def row(self, index: int, prompt: Prompt, params: SamplingParams) -> Row:
        """A request, ready to run. Raises PromptError for a prompt that cannot."""
        limits = {"vocabulary": self.spec.vocabulary, "context_tokens": self.spec.context_tokens}
        ids = token_ids(prompt, params, index=index, tokenizer=self.tokenizer, **limits)
        return Row(index, ids, params, self.tokenizer)

    def plan(
        self, workload: Workload, *, dense: DensePlan | None = None, routing: KnownRouting | None = None
    ) -> PipelinePlan:
        """How to run it, with these dense weights if any are given; ``routing``: what is known by now, else what was at first.

        Raises BudgetError, which names the smallest budget that works.
        """
        pipeline = self.pipeline if dense is None else replace(self.pipeline, dense=(dense,))
        return plan_pipeline(
            pipeline,
            self.costs.layers,
            workload,
            memory_bytes=self.budget_bytes if self.tier is None else self.tier.budget_bytes,
            routing=(routing or self.routing).chances,
            only=self.options.groups,
        )

    def plan_to_load(self, rows: Sequence[Row]) -> PipelinePlan:
        """For what will be asked, if that is known; otherwise for ``UNKNOWN``, or the shortest there is.

        Raises BudgetError where the rows, or the shortest, do not fit one at a time; the budget that it names is enough for the
        rows, or for one of ordinary length.
        """
        if rows:
            return self.plan(workload_of(rows))
        for workload in (UNKNOWN, SHORTEST):
            try:
                return self.plan(workload)
            except BudgetError:
                continue
        return self.plan(ORDINARY)

    def corrected(self, probed: Probed) -> Blueprint:
        """The same with what forwards of the loaded model showed."""
        tier, options = self.tier, self.options
        pipeline = replace(
            self.pipeline,
            spec=replace(self.spec, top_k=probed.top_k),
            cache=probed.cache,
            activation=replace(self.pipeline.activation, top_k=probed.top_k),
            may_move_cache=(
                _may_move_cache(options, probed) if tier is None else tier.may_move_cache(options, probed.cache)
            ),
        )
        return replace(self, pipeline=pipeline)


def draw_up(
    model: str | Path,
    options: Options,
    *,
    on_made: OnMade | None = None,
    makes_store: bool = True,
    waits: bool = False,
) -> Blueprint:
    """``model``: a directory, or an id on the Hugging Face hub. ``on_made``: told of each expert put into the 4-bit store.

    ``waits``: while another process makes that store. ``makes_store``: False leaves one that is not there unmade; such a
    blueprint can be planned with, not loaded.

    Raises UsageError (CheckpointError, MachineError, BudgetError) for what cannot run.
    """
    device = tier_device(options)
    checkpoint = find_checkpoint(model)
    config = load_config(checkpoint)
    table = read_table(options.correlation_table, checkpoint)
    width = 0 if options.lookahead is None else width_of(options.lookahead, checkpoint)
    dtype = _dtype(checkpoint, options)
    meta = build_meta_model(config, dtype.dtype)
    modules = find_experts(meta, config.model_type)
    layout = find_layout(checkpoint, meta, modules, dtype.dtype)
    take_out_experts(meta, modules)
    budget_bytes = automatic_budget_bytes() if options.memory == "auto" else parse_bytes(options.memory)
    machine = _machine(options, checkpoint, layout, dtype.dtype, budget_bytes) if device is None else None
    base_bytes = resident_bytes()
    reset_peak()
    int4 = None
    if options.quantize == "int4" and makes_store:
        layout, int4 = experts_in_4_bits(
            checkpoint, layout, meta, modules, budget_bytes=budget_bytes, on_made=on_made, waits=waits
        )
    elif options.quantize == "int4":
        layout = layout_in_4_bits(checkpoint, layout, meta, modules)
    elif device is not None:
        layout = layout.unpacked()
    elif options.expert_slots is None:
        layout = unpacked_if_it_fits(layout, budget_bytes - dense_nbytes(meta) - OVERHEAD_BYTES)
    sites, dense, pipeline = _planned_with(meta, modules, layout, options, dtype.dtype, width)
    tier = None if device is None else draw_tier(options, device, layout, memory_bytes=budget_bytes)
    if tier is None:
        int4_costs = options.quantize == "int4"
        costs = layer_costs(machine, meta, modules, dtype.dtype, pipeline.spec, int4=int4_costs)
    else:
        pipeline = on_device(pipeline, tier, meta.config, options)
        costs = device_costs(tier, pipeline.spec, dtype.dtype, layout)
    return Blueprint(
        options=options,
        checkpoint=checkpoint,
        model=meta,
        modules=modules,
        layout=layout,
        int4=int4,
        dtype=dtype,
        tokenizer=load_tokenizer(checkpoint),
        end_tokens=end_tokens(checkpoint, config),
        table=table,
        sites=sites,
        budget_bytes=budget_bytes,
        base_bytes=base_bytes,
        dense=dense,
        pipeline=pipeline,
        costs=costs,
        routing=routing_of(checkpoint, pipeline.spec, table=table, trace=options.trace),
        tier=tier,
    )


def _planned_with(
    model: Any,
    modules: Sequence[ExpertsModule],
    layout: CheckpointLayout,
    options: Options,
    dtype: torch.dtype,
    width: int,
) -> tuple[tuple[RouterSite | None, ...], DenseLayers, PipelineModel]:
    """Routers that are asked ahead, the dense weights' places, and the model in numbers, as far as shapes tell.

    ``width``: of the routers' residuals.
    """
    use = options.lookahead
    sites = () if use is None else find_sites(model, modules)
    kept = kept_weights(model, sites)
    dense = find_dense_layers(model, modules, layout, dtype, dense_layers=options.dense_layers, kept=kept)
    probed = probe_ahead(model)
    spec = model_spec(model, layout, probed.top_k, dtype)
    pipeline = PipelineModel(
        spec=spec,
        cache=probed.cache,
        activation=activation_spec(model, spec, layout, itemsize=dtype.itemsize),
        dense=dense.ways,
        slot_bytes=slot_bytes_for(layout.experts_LE),
        scratch_bytes=_scratch_bytes(layout) + (0 if use is None else lookahead_bytes(use, width, sites, modules)),
        whole_prompts=needs_whole_prompts(model),
        max_slots=options.expert_slots,
        may_move_cache=_may_move_cache(options, probed),
    )
    return sites, dense, pipeline


def _dtype(checkpoint: Checkpoint, options: Options) -> DtypeChoice:
    if options.dtype != "auto":
        return choose_for_device(choose_dtype(checkpoint, options.dtype), is_asked_for=True)
    own = own_dtype(checkpoint)
    if options.device == "cuda":
        return DtypeChoice(dtype=own, reason="the checkpoint's own")
    return choose_for_device(own, is_asked_for=False)


def _machine(
    options: Options, checkpoint: Checkpoint, layout: CheckpointLayout, dtype: torch.dtype, budget_bytes: int
) -> Machine | None:
    """The one that was given, or this one as it was measured; a GPU is not measured here."""
    if options.machine is None and options.device == "cuda":
        return None
    if options.machine is None:
        weights_bytes = sum(source.nbytes for row in layout.experts_LE for source in row)
        int4 = options.quantize == "int4"
        return measured_machine(
            checkpoint.path, dtype, int4=int4, weights_bytes=weights_bytes, budget_bytes=budget_bytes
        )
    return options.machine if isinstance(options.machine, Machine) else Machine.load(Path(options.machine))


def _scratch_bytes(layout: CheckpointLayout) -> int:
    """What the experts take in memory beside their slots."""
    return (
        ring_bytes_for(layout.experts_LE)
        + staging_bytes_for(layout.experts_LE, READER_THREADS + 1)
        + int4_scratch_bytes_for(layout.experts_LE)
        + prefetcher_bytes(layout.experts_LE)
    )


def _may_move_cache(options: Options, probed: Probed) -> tuple[bool, ...]:
    """Where caches may be planned: False in memory, True on disk."""
    if options.kv_on_disk is not None:
        return (options.kv_on_disk,)
    may_move = probed.cache.movable_bytes_per_token > 0 and can_hold_kv(options.scratch_directory)
    return (False, True) if may_move else (False,)
