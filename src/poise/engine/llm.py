"""``LLM``: a mixture-of-experts checkpoint that generates within a memory budget, experts streamed from disk.

from poise import LLM, SamplingParams
with LLM("path/to/checkpoint", memory="8GiB") as llm:
    print(llm.generate("def main():", SamplingParams(max_tokens=64))[0].outputs[0].text)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from poise.engine.batch import Row
from poise.engine.companions import end_tokens, load_tokenizer
from poise.engine.dtype import choose_for_device
from poise.engine.finite import cause_of_not_finite
from poise.engine.footprint import (
    automatic_budget_bytes,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    return_freed_memory,
)
from poise.engine.loop import Listeners, Loop, OnLogits, OnProgress, OnText
from poise.engine.planning import activation_spec, layer_costs, measured_machine, refuse_early, workload_of
from poise.engine.prefetcher import make_prefetcher, prefetcher_bytes, read_table
from poise.engine.probe import probe, probe_ahead
from poise.engine.prompts import as_list, params_for, token_ids
from poise.engine.quantize import experts_in_4_bits
from poise.engine.request import QUANTIZATIONS, Progress, Prompt, RequestOutput
from poise.engine.runner import Runner
from poise.engine.sampling import SamplingParams
from poise.engine.streaming import (
    can_hold_kv,
    choose_dense,
    load_resident,
    open_dense,
    open_kv,
    refuse_if_disk_is_full,
)
from poise.errors import BudgetError, CheckpointError, UsageError
from poise.model.cache import needs_whole_prompts
from poise.model.checkpoint import Checkpoint, open_checkpoint
from poise.model.dense import dense_nbytes, take_out_experts
from poise.model.hub import find_model
from poise.model.inspect import build_meta_model, choose_dtype, find_experts, load_config, own_dtype
from poise.model.int4_making import OnMade
from poise.model.int4_store import Int4Store
from poise.model.layout import CheckpointLayout, find_layout
from poise.offload.dense_stream import DenseStream
from poise.offload.expert_store import ExpertStore
from poise.offload.kv_stream import KvStream
from poise.offload.unpacker import ring_bytes_for
from poise.offload.weights import (
    converter_for,
    int4_scratch_bytes_for,
    slot_bytes_for,
    staging_bytes_for,
    unpacked_if_it_fits,
)
from poise.plan.memory import OVERHEAD_BYTES
from poise.plan.pipeline import PipelineModel, PipelinePlan, plan_pipeline
from poise.plan.schedule import Policy
from poise.spec.machine import Machine
from poise.spec.model_spec import ModelSpec
from poise.spec.timeline import Timeline
from poise.units import parse_bytes

READER_THREADS = 2
COMPILED_KERNELS = 32
"""What oneDNN and torch's layer above it may keep of the kernels they compile, one per shape, 0.3 to 1.3 MB each; their own
limit is 1,024. An expert's row counts need few; where attention is materialised every length of the context is a new shape,
used once. The limits are read with the first kernel: too late in a process that has computed in bf16 before."""


class LLM:
    """A loaded model. ``memory`` bounds everything that is added after the imports: weights, caches, activations.

    ``model``: a directory, or an id on the Hugging Face hub. ``memory``: a size such as ``"8GiB"`` or bytes; ``"auto"`` is
    what is free, less a margin. ``dtype``: ``"auto"`` is the checkpoint's, or what a quantised one says to run in, unless
    this device is far slower at it (``describe()`` says why). ``quantize``: ``"int4"`` takes the experts from a 4-bit copy,
    which is made first where there is none; ``on_made(done, total)`` is told of it instead of a bar. ``expert_slots`` caps
    the experts held in memory below what the budget allows. ``dense_layers``: how many layers' dense weights stay in memory,
    the others being read in every pass; None: as many as fit. ``kv_on_disk``: keys and values of batches that are not
    computing lie in an unnamed file in ``scratch_directory`` (None: where temporary files go); None: where that is planned to
    be faster. ``machine``: what this machine was measured to take, or the file that `poise profile` wrote; None: measured
    briefly, once. ``policy``: how passes run. ``correlation_table``: what `poise record --table` wrote,
    else it is learnt while generating. ``groups``: (batch size, batches) among which to choose; None: any. ``expected``: what
    ``generate`` will be given, if that is known; what is wrong with it is then said before weights are read. Raises
    UsageError (CheckpointError, BudgetError) with one clear line for anything that cannot run.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        memory: str | int = "auto",
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        expert_slots: int | None = None,
        dense_layers: int | None = None,
        kv_on_disk: bool | None = None,
        machine: Machine | str | Path | None = None,
        policy: Policy | None = None,
        correlation_table: str | Path | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
        scratch_directory: str | Path | None = None,
        on_made: OnMade | None = None,
        expected: Sequence[tuple[Prompt, SamplingParams]] = (),
    ) -> None:
        self._store: ExpertStore | None = None
        self._dense_stream: DenseStream | None = None
        self._kv: KvStream | None = None
        self._device = _device(device)
        return_freed_memory()
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(COMPILED_KERNELS))
        if quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize {quantize!r} is not supported; choose one of {', '.join(QUANTIZATIONS)}")
        if expert_slots is not None and expert_slots < 1:
            raise UsageError(f"expert_slots is {expert_slots}; it must be at least 1, or left out")
        checkpoint = open_checkpoint(find_model(model))
        config = load_config(checkpoint)
        table = read_table(correlation_table, checkpoint)
        chosen = choose_for_device(
            own_dtype(checkpoint) if dtype == "auto" else choose_dtype(checkpoint, dtype), is_asked_for=dtype != "auto"
        )
        self._dtype, self._dtype_reason = chosen.dtype, chosen.reason
        self._model = build_meta_model(config, self._dtype)
        modules = find_experts(self._model, config.model_type)
        layout = find_layout(checkpoint, self._model, modules, self._dtype)
        take_out_experts(self._model, modules)
        self._heads = _materialised_heads(self._model.config)
        self.budget_bytes = automatic_budget_bytes() if memory == "auto" else parse_bytes(memory)
        weights_bytes = sum(source.nbytes for row in layout.experts_LE for source in row)
        if machine is None:
            machine = measured_machine(
                checkpoint.path, self._dtype, weights_bytes=weights_bytes, budget_bytes=self.budget_bytes
            )
        elif not isinstance(machine, Machine):
            machine = Machine.load(Path(machine))
        self.base_bytes = resident_bytes()
        self._peak_is_ours = reset_peak()
        self._int4: Int4Store | None = None
        if quantize == "int4":
            layout, self._int4 = experts_in_4_bits(
                checkpoint, layout, self._model, modules, budget_bytes=self.budget_bytes, on_made=on_made
            )
        elif expert_slots is None:
            layout = unpacked_if_it_fits(layout, self.budget_bytes - dense_nbytes(self._model) - OVERHEAD_BYTES)
        self._slot_bytes = slot_bytes_for(layout.experts_LE)
        self._scratch_bytes = (
            ring_bytes_for(layout.experts_LE)
            + staging_bytes_for(layout.experts_LE, READER_THREADS + 1)
            + int4_scratch_bytes_for(layout.experts_LE)
            + prefetcher_bytes(layout.experts_LE)
        )
        self._expert_width = max(max(shape) for source in layout.experts_LE[0][:1] for shape in source.shapes.values())
        self._expert_slots = expert_slots
        self._dense = choose_dense(
            self._model,
            modules,
            layout,
            self._dtype,
            dense_layers=dense_layers,
            room_bytes=self.budget_bytes - self._scratch_bytes - OVERHEAD_BYTES,
        )
        self.tokenizer = load_tokenizer(checkpoint)
        self._eos = end_tokens(checkpoint, config)
        self._kv_on_disk, self._scratch_directory, self._groups = kv_on_disk, scratch_directory, groups
        probed = probe_ahead(self._model)
        self._cache = probed.cache
        self.spec = _spec(checkpoint, self._model, layout, probed.top_k, self._dtype)
        rows = [self._row(index, *each) for index, each in enumerate(expected)]
        refuse_early(self._pipeline_model(), self._dense, rows, memory_bytes=self.budget_bytes, only=groups)
        load_resident(self._model, checkpoint, layout, self._dtype, self._device, self._dense)
        self._store = self._open_store(layout)
        try:
            self._dense_stream = open_dense(self._model, self._dense)
            self._kv = open_kv(scratch_directory) if kv_on_disk else None
            self._runner = Runner(self._model, modules, self._store, dense=self._dense_stream)
            probed = probe(self._model, self._device)
        except BaseException:
            self.close()
            raise
        self._cache = probed.cache
        self.spec = _spec(checkpoint, self._model, layout, probed.top_k, self._dtype)
        self._costs = layer_costs(machine, self._model, modules, self._dtype, self.spec)
        self._policy = policy or Policy()
        self._prefetcher = make_prefetcher(self._policy, self.spec, self._store, table)
        self._plan: PipelinePlan | None = None
        self._last: Progress | None = None

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of the process since the model began to load."""
        return peak_resident_bytes()

    def describe(self) -> dict[str, object]:
        """Plain numbers about the model and, after a call of ``generate``, the plan it ran under."""
        plan = self._plan
        facts: dict[str, object] = {
            "architecture": self.spec.architecture,
            "layers": self.spec.num_layers,
            "moe_layers": len(self.spec.moe_layers),
            "experts_per_layer": max(self.spec.experts_L),
            "top_k": self.spec.top_k,
            "expert_bytes": self.spec.expert_bytes,
            "dense_layers_streamed": len(self._dense.plan.streamed),
            "kv_on_disk": self._runner.kv is not None,
            "costs": self._costs.source,
            "dense_bytes": self.spec.dense_bytes,
            "total_bytes": self.spec.total_bytes,
            "dtype": self.spec.dtype,
            "dtype_reason": self._dtype_reason,
            "quantize": "none" if self._int4 is None else "int4",
            "budget_bytes": self.budget_bytes,
            "base_bytes": self.base_bytes,
            "direct_io": self._open().is_direct,
        }
        if self._int4 is not None:
            facts |= {"int4_store": str(self._int4.directory), "int4_weight_error": round(self._int4.weight_error, 4)}
        if plan is not None:
            facts |= {
                "batch_size": plan.group.batch_size,
                "num_batches": plan.group.num_batches,
                "chunk_tokens": plan.group.chunk_tokens,
                "pass_tokens": plan.group.pass_tokens,
                "prefetch_experts": plan.prefetch_experts,
                "expert_slots": plan.num_slots,
                "experts": sum(self.spec.experts_L),
                "cache_bytes": plan.cache_bytes,
                "activation_bytes": plan.activation_bytes,
                "predicted_tokens_per_s": round(plan.predicted_tokens_per_s, 2),
                "bound_tokens_per_s": round(plan.bound_tokens_per_s, 2),
                "bottleneck": plan.bottleneck,
            }
        return facts

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_text: OnText | None = None,
        on_result: Callable[[RequestOutput], None] | None = None,
        on_progress: OnProgress | None = None,
        on_logits: OnLogits | None = None,
        timeline: Timeline | None = None,
    ) -> list[RequestOutput]:
        """Generates for all prompts; results in input order.

        ``sampling_params``: one for all, or one per prompt. ``on_text(index, piece)`` streams text, ``on_result`` tells of
        each finished request at once, ``on_progress`` of every pass, ``on_logits(row, logits_V)`` of every choice of a token;
        ``timeline`` takes down what computed, was read, and waited when. Raises PromptError for a prompt that is empty or
        longer than the context, BudgetError when one row does not fit, CheckpointError when the model's output is not finite.
        On an error or Ctrl-C nothing of the call is left behind and the LLM can be used again.
        """
        listed = as_list(prompts)
        params = params_for(listed, sampling_params)
        rows = [self._row(index, prompt, each) for index, (prompt, each) in enumerate(zip(listed, params, strict=True))]
        if not rows:
            return []
        store = self._open()
        self._plan = plan = self._plan_for(rows)
        self._use_kv(plan, rows)
        store.resize(plan.num_slots)
        store.policy = self._policy if self._policy.ahead else replace(self._policy, ahead=plan.prefetch_experts)
        store.timeline = timeline
        self._runner.listen(self._prefetcher, on=plan.num_slots < sum(self.spec.experts_L))
        results: dict[int, RequestOutput] = {}

        def finished(row: Row) -> None:
            prompt = listed[row.index]
            text = prompt if isinstance(prompt, str) else None
            results[row.index] = result = RequestOutput(
                index=row.index, prompt=text, prompt_token_ids=row.prompt_ids, outputs=(row.completion(),)
            )
            if on_result is not None:
                on_result(result)

        pad_id = min((token for token in self._eos if 0 <= token < self.spec.vocabulary), default=0)
        loop = Loop(self._runner, plan.group, rows, eos=self._eos, pad_id=pad_id, device=self._device)
        listeners = Listeners(on_row=finished, on_text=on_text, on_progress=on_progress, on_logits=on_logits)
        try:
            self._last = loop.run(listeners)
        except FloatingPointError as error:
            raise CheckpointError(f"{error}: {cause_of_not_finite(self._model, store)}") from None
        finally:
            if self._kv is not None:
                self._kv.forget_all()
        return [results[index] for index in range(len(rows))]

    @property
    def runner(self) -> Runner:
        """The forward passes themselves, for measurements beside ``generate``; what those take is in no memory plan."""
        return self._runner

    @property
    def last_progress(self) -> Progress | None:
        """The final figures of the last call of ``generate``."""
        return self._last

    def close(self) -> None:
        """Ends the reader threads and gives the experts' memory back. Safe to call twice."""
        if self._store is not None:
            self._store.close()
            self._store = None
        for stream in (self._dense_stream, self._kv):
            if stream is not None:
                stream.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> ExpertStore:
        if self._store is None:
            raise UsageError("this LLM is closed; make a new one")
        return self._store

    def _open_store(self, layout: CheckpointLayout) -> ExpertStore:
        num_experts = sum(len(row) for row in layout.experts_LE)
        capacity = max(1, min(num_experts, self.budget_bytes // self._slot_bytes))
        return ExpertStore(
            layout.experts_LE,
            num_slots=1,
            slot_bytes=self._slot_bytes,
            capacity=capacity,
            reader_threads=READER_THREADS,
            convert=converter_for(self._model),
        )

    def _row(self, index: int, prompt: Prompt, params: SamplingParams) -> Row:
        limits = {"vocabulary": self.spec.vocabulary, "context_tokens": self.spec.context_tokens}
        ids = token_ids(prompt, params, index=index, tokenizer=self.tokenizer, **limits)
        return Row(index, ids, params, self.tokenizer)

    def _plan_for(self, rows: Sequence[Row]) -> PipelinePlan:
        model = self._pipeline_model()
        try:
            return plan_pipeline(
                model, self._costs.layers, workload_of(rows), memory_bytes=self.budget_bytes, only=self._groups
            )
        except BudgetError as error:
            fixed = model.scratch_bytes + OVERHEAD_BYTES
            raise self._dense.corrected(error, budget_bytes=self.budget_bytes, fixed_bytes=fixed) from None

    def _pipeline_model(self) -> PipelineModel:
        may_move = self._cache.movable_bytes_per_token > 0 and can_hold_kv(self._scratch_directory)
        chosen = (self._kv_on_disk,) if self._kv_on_disk is not None else (False, True) if may_move else (False,)
        return PipelineModel(
            spec=self.spec,
            cache=self._cache,
            activation=activation_spec(
                self._model,
                self.spec,
                expert_width=self._expert_width,
                itemsize=self._dtype.itemsize,
                materialised_heads=self._heads,
            ),
            dense=(self._dense.plan,),
            slot_bytes=self._slot_bytes,
            scratch_bytes=self._scratch_bytes,
            whole_prompts=needs_whole_prompts(self._model),
            max_slots=self._expert_slots,
            may_move_cache=chosen,
        )

    def _use_kv(self, plan: PipelinePlan, rows: Sequence[Row]) -> None:
        """Opens the caches' file where the plan has them on disk. Raises UsageError when they do not fit there."""
        if plan.cache_on_disk and self._kv is None:
            self._kv = open_kv(self._scratch_directory)
        self._runner.kv = kv = self._kv if plan.cache_on_disk else None
        if kv is not None:
            longest = sorted((row.total_tokens for row in rows), reverse=True)[: plan.group.max_rows]
            refuse_if_disk_is_full(kv, sum(longest) * self._cache.movable_bytes_per_token)


def _materialised_heads(config: Any) -> int:
    """Heads whose attention scores are written out: none where SDPA has a fused kernel (keys as wide as values)."""
    text = config.get_text_config()
    fused = config._attn_implementation == "sdpa" and getattr(text, "kv_lora_rank", None) is None
    return 0 if fused else int(text.num_attention_heads)


def _device(device: str) -> torch.device:
    if device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r} is not supported yet; experts are streamed to the CPU: give auto or cpu")
    return torch.device("cpu")


def _spec(checkpoint: Checkpoint, model: Any, layout: CheckpointLayout, top_k: int, dtype: torch.dtype) -> ModelSpec:
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
