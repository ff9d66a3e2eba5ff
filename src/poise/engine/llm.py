"""``LLM``: a mixture-of-experts checkpoint that generates within a memory budget, experts streamed from disk.

from poise import LLM, SamplingParams
with LLM("path/to/checkpoint", memory="8GiB") as llm:
    print(llm.generate("def main():", SamplingParams(max_tokens=64))[0].outputs[0].text)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from poise.engine.batch import Row
from poise.engine.companions import end_tokens, load_tokenizer
from poise.engine.finite import cause_of_not_finite
from poise.engine.footprint import (
    automatic_budget_bytes,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    return_freed_memory,
)
from poise.engine.loop import Listeners, Loop, OnLogits, OnProgress, OnText
from poise.engine.probe import probe
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.runner import Runner
from poise.engine.sampling import SamplingParams
from poise.errors import BudgetError, CheckpointError, PromptError, UsageError
from poise.model.cache import needs_whole_prompts
from poise.model.checkpoint import Checkpoint, open_checkpoint
from poise.model.dense import dense_nbytes, load_dense, take_out_experts
from poise.model.hub import find_model
from poise.model.inspect import build_meta_model, choose_dtype, find_experts, load_config
from poise.model.layout import CheckpointLayout, find_layout
from poise.model.quantisation import stated_dtype
from poise.offload.expert_store import ExpertStore
from poise.offload.unpacker import ring_bytes_for
from poise.offload.weights import converter_for, slot_bytes_for, staging_bytes_for, unpacked_if_it_fits
from poise.plan.memory import OVERHEAD_BYTES, ActivationSpec, MemoryPlan, plan_memory
from poise.spec.model_spec import ModelSpec
from poise.units import format_bytes, parse_bytes

READER_THREADS = 2
COMPILED_KERNELS = 32
"""What oneDNN and torch's layer above it may keep of the kernels they compile, one per shape, 0.3 to 1.3 MB each; their own
limit is 1,024. An expert's row counts need few; where attention is materialised every length of the context is a new shape,
used once. The limits are read with the first kernel: too late in a process that has computed in bf16 before."""


class LLM:
    """A loaded model. ``memory`` bounds everything that is added after the imports: weights, caches, activations.

    ``model``: a directory, or an id on the Hugging Face hub. ``memory``: a size such as ``"8GiB"`` or bytes; ``"auto"`` is
    what is free, less a margin. ``dtype``: ``"auto"`` keeps the checkpoint's, or what a quantised one says to run in.
    ``expert_slots`` caps the experts held in memory below what the budget allows. Raises UsageError (CheckpointError,
    BudgetError) with one clear line for anything that cannot run.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        memory: str | int = "auto",
        device: str = "auto",
        dtype: str = "auto",
        expert_slots: int | None = None,
    ) -> None:
        self._store: ExpertStore | None = None
        self._device = _device(device)
        return_freed_memory()
        if expert_slots is not None and expert_slots < 1:
            raise UsageError(f"expert_slots is {expert_slots}; it must be at least 1, or left out")
        checkpoint = open_checkpoint(find_model(model))
        config = load_config(checkpoint)
        is_stated = checkpoint.scheme is not None and dtype == "auto"
        self._dtype = choose_dtype(checkpoint, stated_dtype(checkpoint.config) if is_stated else dtype)
        self._model = build_meta_model(config, self._dtype)
        modules = find_experts(self._model, config.model_type)
        layout = find_layout(checkpoint, self._model, modules, self._dtype)
        take_out_experts(self._model, modules)
        self._heads = _materialised_heads(self._model.config)
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(COMPILED_KERNELS))
        self.base_bytes = resident_bytes()
        self._peak_is_ours = reset_peak()
        self.budget_bytes = automatic_budget_bytes() if memory == "auto" else parse_bytes(memory)
        if expert_slots is None:
            layout = unpacked_if_it_fits(layout, self.budget_bytes - dense_nbytes(self._model) - OVERHEAD_BYTES)
        self._slot_bytes = slot_bytes_for(layout.experts_LE)
        self._scratch_bytes = ring_bytes_for(layout.experts_LE) + staging_bytes_for(
            layout.experts_LE, READER_THREADS + 1
        )
        self._expert_width = max(max(shape) for source in layout.experts_LE[0][:1] for shape in source.shapes.values())
        self._expert_slots = expert_slots
        self._refuse_if_hopeless()
        load_dense(self._model, checkpoint, layout, self._dtype, self._device)
        self.tokenizer = load_tokenizer(checkpoint)
        self._eos = end_tokens(checkpoint, config)
        self._store = self._open_store(layout)
        try:
            self._runner = Runner(self._model, modules, self._store)
            probed = probe(self._model, self._device)
        except BaseException:
            self.close()
            raise
        self._cache = probed.cache
        self.spec = _spec(checkpoint, self._model, layout, probed.top_k, self._dtype)
        self._plan: MemoryPlan | None = None
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
            "dense_bytes": self.spec.dense_bytes,
            "total_bytes": self.spec.total_bytes,
            "dtype": self.spec.dtype,
            "budget_bytes": self.budget_bytes,
            "base_bytes": self.base_bytes,
            "direct_io": self._open().is_direct,
        }
        if plan is not None:
            facts |= {
                "batch_size": plan.batch_size,
                "num_batches": plan.num_batches,
                "chunk_tokens": plan.chunk_tokens,
                "expert_slots": plan.num_slots,
                "experts": sum(self.spec.experts_L),
                "cache_bytes": plan.cache_bytes,
                "activation_bytes": plan.activation_bytes,
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
    ) -> list[RequestOutput]:
        """Generates for all prompts; results in input order.

        ``sampling_params``: one for all, or one per prompt. ``on_text(index, piece)`` streams text, ``on_result`` tells of
        each finished request at once, ``on_progress`` of every pass, ``on_logits(row, logits_V)`` of every choice of a
        token. Raises PromptError for a prompt that is empty or longer than the context, BudgetError when one row does not
        fit, CheckpointError when the model's output is not finite. On an error or Ctrl-C nothing of the call is left behind
        and the LLM can be used again.
        """
        listed: Sequence[Prompt] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        params = _params_for(listed, sampling_params)
        rows = [self._row(index, prompt, each) for index, (prompt, each) in enumerate(zip(listed, params, strict=True))]
        if not rows:
            return []
        store = self._open()
        self._plan = plan = self._plan_for(rows)
        store.resize(plan.num_slots)
        results: dict[int, RequestOutput] = {}

        def finished(row: Row) -> None:
            prompt = listed[row.index]
            text = prompt if isinstance(prompt, str) else None
            results[row.index] = result = RequestOutput(
                index=row.index, prompt=text, prompt_token_ids=row.prompt_ids, outputs=(row.completion(),)
            )
            if on_result is not None:
                on_result(result)

        pad_id = min(self._eos, default=0)
        loop = Loop(self._runner, plan, rows, eos=self._eos, pad_id=pad_id, device=self._device)
        listeners = Listeners(on_row=finished, on_text=on_text, on_progress=on_progress, on_logits=on_logits)
        try:
            self._last = loop.run(listeners)
        except FloatingPointError as error:
            raise CheckpointError(f"{error}: {cause_of_not_finite(self._model, store)}") from None
        return [results[index] for index in range(len(rows))]

    @property
    def last_progress(self) -> Progress | None:
        """The final figures of the last call of ``generate``."""
        return self._last

    def close(self) -> None:
        """Ends the reader threads and gives the experts' memory back. Safe to call twice."""
        if self._store is not None:
            self._store.close()
            self._store = None

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

    def _refuse_if_hopeless(self) -> None:
        """Before anything is loaded: the dense part, one expert and the overhead must fit."""
        dense = dense_nbytes(self._model)
        needed = dense + self._slot_bytes + self._scratch_bytes + OVERHEAD_BYTES
        if needed > self.budget_bytes:
            raise BudgetError(
                f"a memory budget of {format_bytes(self.budget_bytes)} is too small for this model: its dense weights take "
                f"{format_bytes(dense)}, one expert {format_bytes(self._slot_bytes)}; give at least {needed} bytes "
                f"({format_bytes(needed)}) and some for caches",
                smallest_bytes=needed,
            )

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
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("it is text and the checkpoint has no tokenizer; give prompt_token_ids", index=index)
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt["prompt_token_ids"])
        vocabulary = self.spec.vocabulary
        if not ids:
            raise PromptError("it is empty; give at least one token", index=index)
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise PromptError(f"it has token id {wrong}; the model's vocabulary has 0 to {vocabulary - 1}", index=index)
        if len(ids) + params.max_tokens > self.spec.context_tokens:
            raise PromptError(
                f"it has {len(ids)} tokens and asks for {params.max_tokens} more; the model's context is "
                f"{self.spec.context_tokens}: shorten the prompt or lower max_tokens",
                index=index,
            )
        return Row(index, ids, params, self.tokenizer)

    def _plan_for(self, rows: Sequence[Row]) -> MemoryPlan:
        widths = [parameter.shape[0] for parameter in self._model.parameters() if parameter.dim() == 2]
        wide = [width for width in widths if width != self.spec.vocabulary]
        activation = ActivationSpec(
            hidden=self.spec.hidden,
            width=max(wide, default=self.spec.hidden),
            expert_width=self._expert_width,
            top_k=self.spec.top_k,
            vocabulary=self.spec.vocabulary,
            itemsize=self._dtype.itemsize,
            materialised_heads=self._heads,
        )
        return plan_memory(
            budget_bytes=self.budget_bytes,
            dense_bytes=self.spec.dense_bytes + self._scratch_bytes,
            slot_bytes=self._slot_bytes,
            num_experts=sum(self.spec.experts_L),
            cache=self._cache,
            activation=activation,
            prompt_tokens=[len(row.prompt_ids) for row in rows],
            total_tokens=[row.total_tokens for row in rows],
            max_slots=self._expert_slots,
            whole_prompts=needs_whole_prompts(self._model),
        )


def _materialised_heads(config: Any) -> int:
    """Heads whose attention scores are written out: none where SDPA has a fused kernel (keys as wide as values)."""
    text = config.get_text_config()
    fused = config._attn_implementation == "sdpa" and getattr(text, "kv_lora_rank", None) is None
    return 0 if fused else int(text.num_attention_heads)


def _device(device: str) -> torch.device:
    if device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r} is not supported yet; experts are streamed to the CPU: give auto or cpu")
    return torch.device("cpu")


def _params_for(
    prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * len(prompts)
    if len(given) != len(prompts):
        raise UsageError(
            f"{len(given)} sampling_params for {len(prompts)} prompts; give one for all, or one per prompt"
        )
    return given


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
