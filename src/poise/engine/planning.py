"""From a loaded model to the numbers a pipeline is planned with: sizes from the model, times from the machine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poise.cost.layer_costs import LayerShapes, MachineCosts, RooflineCosts
from poise.engine.batch import Row
from poise.engine.request import UNKNOWN_PROMPT_TOKENS, UNKNOWN_REQUESTS
from poise.engine.sampling import SamplingParams
from poise.errors import MachineError
from poise.model.checkpoint import Checkpoint
from poise.model.dense import dense_nbytes
from poise.model.fingerprint import model_fingerprint
from poise.model.inspect import ExpertsModule
from poise.model.layout import CheckpointLayout
from poise.plan.device_memory import DeviceActivationSpec
from poise.plan.memory import ActivationSpec
from poise.plan.passes import LayerCosts
from poise.plan.routing import Routing
from poise.plan.workload import Workload
from poise.predict.correlation import CorrelationTable
from poise.profile.calibrate import calibrate
from poise.profile.subject import Subject, subject_of_checkpoint
from poise.spec.machine import Machine
from poise.spec.model_spec import ModelSpec
from poise.spec.trace import TRACE_FORMAT, RoutingTrace
from poise.units import GIB

logger = logging.getLogger(__name__)

MEASURED_BYTES = GIB
"""Models of fewer bytes are planned without measuring: that would take longer than most of their runs. Nor is anything
measured within a smaller budget, in which it might not fit."""
UNKNOWN = Workload(
    prompt_tokens=(UNKNOWN_PROMPT_TOKENS,) * UNKNOWN_REQUESTS,
    new_tokens=(SamplingParams().max_tokens,) * UNKNOWN_REQUESTS,
)
"""What is planned for where nobody says what will be asked."""
ORDINARY = Workload(prompt_tokens=(UNKNOWN_PROMPT_TOKENS,), new_tokens=(SamplingParams().max_tokens,))
"""What the budget that a refusal names is enough for then."""
SHORTEST = Workload(prompt_tokens=(1,), new_tokens=(1,))
"""A budget too small even for it is refused before anything is loaded."""

INT4_ITEMSIZE = 4.5 / 8
"""Bytes of a weight in 4 bits, its share of scale and zero included."""
ENOUGH_CHOICES = 8
"""A correlation table must have seen so many choices of the average expert for planning to go by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """``source``: where the times come from, in words for the user."""

    layers: LayerCosts
    source: str


def measured_machine(
    path: str | Path, dtype: torch.dtype, *, int4: bool, weights_bytes: int, budget_bytes: int
) -> Machine | None:
    """What was measured for this model on this machine, now or before; None where that is not worth it.

    Takes up to half a GiB for some seconds: call it before the weights are loaded.
    """
    if min(weights_bytes, budget_bytes) < MEASURED_BYTES:
        return None
    return calibrate(subject_of_checkpoint(path, dtype_for=lambda own: dtype, int4=int4))


def layer_costs(
    machine: Machine | None,
    model: Any,
    modules: Sequence[ExpertsModule],
    dtype: torch.dtype,
    spec: ModelSpec,
    *,
    int4: bool,
) -> Costs:
    """The model's layers on this machine. Shapes that the machine was not measured for are said, and estimated."""
    if machine is not None:
        subject = Subject(name=spec.architecture, model=model, modules=tuple(modules), dtype=dtype, int4=int4)
        try:
            shapes = LayerShapes(
                expert=subject.expert_shape,
                attention=subject.attention_shape,
                gate=subject.gate_shape,
                dense=subject.dense_shape,
            )
            return Costs(layers=MachineCosts(machine, shapes), source="measured on this machine")
        except MachineError as error:
            logger.warning("%s; planning with estimates", error)
    itemsize = dtype.itemsize
    head_bytes = spec.hidden * spec.vocabulary * itemsize
    estimates = RooflineCosts(
        expert_bytes=spec.expert_bytes,
        attention_bytes=max(0, spec.dense_bytes - 2 * head_bytes) // spec.num_layers,
        head_bytes=head_bytes,
        itemsize=itemsize,
        expert_itemsize=INT4_ITEMSIZE if int4 else itemsize,
    )
    return Costs(layers=estimates, source="estimated (small model or budget)")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRouting:
    """Where tokens go, and ``source``: how that is known, in words for the user. ``chances`` None: it is not known."""

    chances: Routing | None
    source: str


UNIFORM = KnownRouting(chances=None, source="uniform, as none is recorded")


def routing_of(
    checkpoint: Checkpoint, spec: ModelSpec, *, table: CorrelationTable | None, trace: str | Path | None
) -> KnownRouting:
    """From what `poise record` wrote. Raises TraceError for a trace that is damaged or of another model."""
    if trace is not None:
        recorded = RoutingTrace.load(Path(trace))
        fingerprint = model_fingerprint(checkpoint)
        if recorded.model.rpartition("@")[2] != fingerprint or recorded.layers != spec.moe_layers:
            raise TRACE_FORMAT.refusal(Path(trace), f"is of model {recorded.model[:60]}, and this one is {fingerprint}")
        tokens = sum(recorded.tokens_per_step)
        chances = Routing.recorded(recorded.load_LE, spec.top_k)
        return KnownRouting(chances=chances, source=f"recorded, {tokens:,} tokens")
    return UNIFORM if table is None else routing_in(table, spec)


def routing_in(table: CorrelationTable, spec: ModelSpec) -> KnownRouting:
    """From a correlation table; one that has seen too few tokens would take chance for preference, and is not asked."""
    if table.num_tokens * spec.top_k < ENOUGH_CHOICES * max(spec.experts_L):
        return UNIFORM
    return KnownRouting(chances=Routing.recorded(table.chances_LE, spec.top_k), source="a correlation table")


def workload_of(rows: Sequence[Row]) -> Workload:
    """The rows in numbers."""
    return Workload(
        prompt_tokens=tuple(len(row.prompt_ids) for row in rows),
        new_tokens=tuple(row.params.max_tokens for row in rows),
    )


def activation_spec(model: Any, spec: ModelSpec, layout: CheckpointLayout, *, itemsize: int) -> ActivationSpec:
    """What a token takes in memory while a pass runs."""
    widths = [parameter.shape[0] for parameter in model.parameters() if parameter.dim() == 2]
    wide = [width for width in widths if width != spec.vocabulary]
    return ActivationSpec(
        hidden=spec.hidden,
        width=max(wide, default=spec.hidden),
        expert_width=max(max(shape) for source in layout.experts_LE[0][:1] for shape in source.shapes.values()),
        top_k=spec.top_k,
        vocabulary=spec.vocabulary,
        itemsize=itemsize,
        materialised_heads=_materialised_heads(model.config),
        repeated_width=_repeated_width(model.config),
    )


def on_accelerator(activation: ActivationSpec, config: Any) -> DeviceActivationSpec:
    """The same on an accelerator. Its fused kernels want keys of all heads, or 16 bits: else scores are written out."""
    heads = activation.materialised_heads
    if activation.itemsize >= torch.float32.itemsize and activation.repeated_width:
        heads = int(config.get_text_config().num_attention_heads)
    fields = {each.name: getattr(activation, each.name) for each in dataclasses.fields(activation)}
    return DeviceActivationSpec(**fields | {"materialised_heads": heads})


def _repeated_width(config: Any) -> int:
    """Keys and values of all query heads, where several share one: transformers repeats them wherever there is a mask, and a
    kernel that writes scores out does so always."""
    text = config.get_text_config()
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if not isinstance(heads, int) or shared in (None, heads):
        return 0
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * heads * int(size)


def _materialised_heads(config: Any) -> int:
    """Heads whose attention scores are written out: none where SDPA has a fused kernel (keys as wide as values)."""
    text = config.get_text_config()
    fused = config._attn_implementation == "sdpa" and getattr(text, "kv_lora_rank", None) is None
    return 0 if fused else int(text.num_attention_heads)


def model_spec(model: Any, layout: CheckpointLayout, top_k: int, dtype: torch.dtype) -> ModelSpec:
    """The model in numbers."""
    config = model.config.get_text_config()
    sources = [source for row in layout.experts_LE for source in row]
    return ModelSpec(
        architecture=type(model).__name__,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(row[0].layer for row in layout.experts_LE),
        experts_L=tuple(len(row) for row in layout.experts_LE),
        top_k=top_k,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        context_tokens=getattr(config, "max_position_embeddings", None) or 1 << 20,
        expert_bytes=max(source.nbytes for source in sources),
        experts_bytes=sum(source.nbytes for source in sources),
        dense_bytes=dense_nbytes(model),
        dtype=str(dtype).removeprefix("torch."),
    )
