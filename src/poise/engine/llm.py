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
from poise.engine.blueprint import READER_THREADS, Blueprint, Options, draw_up
from poise.engine.dense_weights import DenseWeights, load_resident
from poise.engine.device_tier import open_device_kv, open_device_store
from poise.engine.facts import model_facts, plan_facts
from poise.engine.finite import cause_of_not_finite
from poise.engine.footprint import Ceiling, give_back_freed_memory, peak_resident_bytes, return_freed_memory
from poise.engine.kv_file import kv_file_bytes, open_kv, refuse_if_disk_is_full
from poise.engine.lookahead_prefetcher import LookaheadPrefetcher
from poise.engine.lookahead_use import LookaheadUse, make_lookahead
from poise.engine.loop import Listeners, Loop, OnLogits, OnProgress, OnText
from poise.engine.online_lookahead import OnlineLearner
from poise.engine.planning import routing_in, workload_of
from poise.engine.prefetcher import Prefetcher, empty_table, make_prefetcher
from poise.engine.probe import probe
from poise.engine.prompts import as_list, params_for
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.runner import Runner
from poise.engine.sampling import SamplingParams
from poise.errors import BudgetError, CheckpointError, UsageError
from poise.model.fingerprint import model_fingerprint
from poise.model.int4_making import OnMade
from poise.model.weights import converter_for
from poise.offload.expert_store import ExpertStore
from poise.offload.kv_stream import KvStream
from poise.offload.loader import open_disk_store
from poise.plan.dense import DensePlan
from poise.plan.pipeline import PipelinePlan, worth_changing
from poise.plan.schedule import Policy
from poise.spec.machine import Machine
from poise.spec.model_spec import ModelSpec
from poise.spec.timeline import Timeline

COMPILED_KERNELS = 32
"""What oneDNN and torch's layer above it may keep of the kernels they compile, one per shape, 0.3 to 1.3 MB each; their own
limit is 1,024. An expert's row counts need few; where attention is materialised every length of the context is a new shape,
used once. The limits are read with the first kernel: too late in a process that has computed in bf16 before."""


class LLM:
    """A loaded model. ``memory`` bounds everything that is added after the imports: weights, caches, activations.

    ``model``: a directory, or an id on the Hugging Face hub. ``memory``: a size such as ``"8GiB"`` or bytes; ``"auto"`` is
    what is free, less a margin. ``device``: ``"cuda"`` computes on a GPU: dense weights and caches lie there, experts are
    copied to it from DRAM; ``device_memory`` bounds what lies there (None, ``"auto"``: what is free, less a margin), and with
    ``"cpu"`` has ordinary memory play a device so small. ``dtype``: ``"auto"`` is the checkpoint's, or what a quantised one
    says to run in, unless this device is far slower at it (``describe()`` says why). ``quantize``: ``"int4"`` takes the experts
    from a 4-bit copy, which is made first where there is none; ``on_made(done, total)`` is told of it instead of a bar.
    ``expert_slots`` caps the experts held in memory below what the budget allows. ``dense_layers``: how many layers' dense
    weights stay in memory, the others being read in every pass; None: as many as is fastest, decided anew for each call.
    ``kv_on_disk``: keys and values of batches that are not computing lie in an unnamed file in ``scratch_directory`` (None:
    where temporary files go), behind a device in DRAM; None: where that is planned to be faster. ``machine``: what this machine
    was measured to take, or the file that `poise profile` wrote; None: measured briefly, once. ``policy``: how passes run.
    ``correlation_table``: what `poise record --table` or ``save_table`` wrote, else it is learnt while generating;
    ``learns_table``: also if none streams. ``lookahead``: with a predictor of each layer's routing, ``LLM.lookahead``.
    ``groups``: (batch size, batches) among which to choose; None: any. ``expected``: what ``generate`` will be given, if that
    is known; what is wrong with it is then said before weights are read. Raises UsageError (CheckpointError, BudgetError) with
    one clear line for anything that cannot run.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        memory: str | int = "auto",
        device: str = "auto",
        device_memory: str | int | None = None,
        dtype: str = "auto",
        quantize: str = "none",
        expert_slots: int | None = None,
        dense_layers: int | None = None,
        kv_on_disk: bool | None = None,
        machine: Machine | str | Path | None = None,
        policy: Policy | None = None,
        correlation_table: str | Path | None = None,
        learns_table: bool = False,
        lookahead: LookaheadUse | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
        scratch_directory: str | Path | None = None,
        on_made: OnMade | None = None,
        expected: Sequence[tuple[Prompt, SamplingParams]] = (),
    ) -> None:
        self._store: ExpertStore | None = None
        self._dense: DenseWeights | None = None
        self._kv: KvStream | None = None
        self._last: Progress | None = None
        self._plan: PipelinePlan | None = None
        self._policy = policy or Policy()
        self._learns_table = learns_table
        return_freed_memory()
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(COMPILED_KERNELS))
        options = Options(
            memory=memory,
            device=device,
            device_memory=device_memory,
            dtype=dtype,
            quantize=quantize,
            expert_slots=expert_slots,
            dense_layers=dense_layers,
            kv_on_disk=kv_on_disk,
            machine=machine,
            groups=groups,
            scratch_directory=scratch_directory,
            correlation_table=correlation_table,
            lookahead=lookahead,
        )
        self._blueprint = draw_up(model, options, on_made=on_made)
        rows = [self._blueprint.row(index, *each) for index, each in enumerate(expected)]
        planned = self._blueprint.plan_to_load(rows)
        try:
            self._load(planned.dense)
        except BaseException:
            self.close()
            raise

    def _load(self, dense: DensePlan) -> None:
        """Reads the dense weights and opens everything that runs."""
        drawn = self._blueprint
        streamed = drawn.dense.streamed(dense)
        load_resident(drawn.model, drawn.checkpoint, drawn.layout, drawn.dtype.dtype, drawn.device, streamed)
        self._store = store = _open_store(drawn)
        self._dense = DenseWeights(drawn.model, drawn.dense, dense, store)
        if drawn.options.kv_on_disk:
            self._kv = open_kv(drawn.options.scratch_directory)
        ceiling = Ceiling(drawn.base_bytes + drawn.budget_bytes) if drawn.tier is None else None
        self._runner = Runner(drawn.model, drawn.modules, store, dense=self._dense.stream, ceiling=ceiling)
        self._blueprint = drawn.corrected(probe(drawn.model, drawn.device))
        use = drawn.options.lookahead
        of_model = (drawn.model, drawn.modules, drawn.sites, drawn.checkpoint)
        self.lookahead = None if use is None else make_lookahead(use, *of_model)
        self._table = drawn.table or empty_table(self.spec)
        self._learner = Prefetcher(self._table, None)
        self._prefetcher = make_prefetcher(self._policy, store, self._table)
        self._foresight = None
        if use is not None and use.prefetches and self._prefetcher is not None and self.lookahead is not None:
            self._foresight = LookaheadPrefetcher(self.lookahead, self._table, store.foresee, mixes=use.mixes)
        self.online = None
        if use is not None and use.online and self.lookahead is not None:
            self.online = OnlineLearner(self.lookahead)

    @property
    def spec(self) -> ModelSpec:
        """The model in numbers."""
        return self._blueprint.spec

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's, or None where it has none."""
        return self._blueprint.tokenizer

    @property
    def budget_bytes(self) -> int:
        """What everything that is added after the imports may take."""
        return self._blueprint.budget_bytes

    @property
    def base_bytes(self) -> int:
        """What the process held before the model began to load."""
        return self._blueprint.base_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of the process since the model began to load."""
        return peak_resident_bytes()

    @property
    def device_peak_bytes(self) -> int | None:
        """The most that torch has given out of a GPU's memory since the process began; None where the CPU computes."""
        device = self._blueprint.device
        return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None

    @property
    def device_budget_bytes(self) -> int | None:
        """What may lie on the device that experts are copied to; None where there is none."""
        tier = self._blueprint.tier
        return None if tier is None else tier.budget_bytes

    def describe(self) -> dict[str, object]:
        """Plain numbers about the model and, after a call of ``generate``, the plan it ran under."""
        facts = model_facts(self._blueprint) | {
            "dense_layers_streamed": len(self._loaded().plan.streamed),
            "kv_on_disk": self._runner.kv is not None,
            "direct_io": self._open().is_direct,
            "foreseen_by": "correlation table" if self._foresight is None else self._foresight.name,
        }
        return facts if self._plan is None else facts | plan_facts(self._blueprint, self._plan)

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
        drawn, asked = self._blueprint, zip(listed, params, strict=True)
        rows = [drawn.row(index, prompt, each) for index, (prompt, each) in enumerate(asked)]
        if not rows:
            return []
        store = self._open()
        self._plan = plan = self._plan_for(rows)
        self._follow(plan, rows)
        store.timeline = timeline
        results: dict[int, RequestOutput] = {}

        def finished(row: Row) -> None:
            results[row.index] = result = _output(row, listed[row.index])
            if on_result is not None:
                on_result(result)

        pad_id = min((token for token in drawn.end_tokens if 0 <= token < self.spec.vocabulary), default=0)
        loop = Loop(self._runner, plan.group, rows, eos=drawn.end_tokens, pad_id=pad_id, device=drawn.device)

        def passed(progress: Progress) -> None:
            if self.online is not None:
                self.online.idle()
            if on_progress is not None:
                on_progress(progress)

        listeners = Listeners(on_row=finished, on_text=on_text, on_progress=passed, on_logits=on_logits)
        try:
            self._last = loop.run(listeners)
        except FloatingPointError as error:
            raise CheckpointError(f"{error}: {cause_of_not_finite(drawn.model, store)}") from None
        finally:
            if self._kv is not None:
                self._kv.forget_all()
        return [results[index] for index in range(len(rows))]

    @property
    def runner(self) -> Runner:
        """The forward passes themselves, for measurements beside ``generate``; what those take is in no memory plan."""
        return self._runner

    def use_policy(self, policy: Policy) -> None:
        """How passes run from the next call on."""
        self._runner.listen(self._prefetcher, on=False)
        self._policy = policy
        self._prefetcher = make_prefetcher(policy, self._open(), self._table)

    @property
    def last_progress(self) -> Progress | None:
        """The final figures of the last call of ``generate``."""
        return self._last

    def save_table(self, path: str | Path) -> bool:
        """Writes the correlation table as learnt so far, whole or not at all; False, and no file, if no pass was learnt from.

        What ``correlation_table`` takes. Only passes in which experts stream teach it, unless ``learns_table`` was asked for.
        Raises TraceError if it cannot be written.
        """
        if self._passes_learnt:
            self._table.save(Path(path), model=model_fingerprint(self._blueprint.checkpoint))
        return self._passes_learnt > 0

    def close(self) -> None:
        """Ends the reader threads and gives the experts' memory back. Safe to call twice."""
        for stream in (self._dense, self._kv):
            if stream is not None:
                stream.close()
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

    @property
    def _passes_learnt(self) -> int:
        return sum(each.passes for each in (self._learner, self._prefetcher, self._foresight) if each is not None)

    def _listen(self, *, streams: bool) -> None:
        """Has the prefetcher look ahead where experts stream; where none does, the table learns if it is to."""
        self._runner.listen(self._prefetcher, on=streams and self._foresight is None)
        self._runner.watch(self._foresight, on=streams)
        self._runner.watch(self.online)
        self._open().while_waiting = None if self.online is None else self.online.idle
        learns_alone = self._prefetcher is None or not streams
        self._runner.listen(self._learner, on=self._learns_table and learns_alone)

    def _loaded(self) -> DenseWeights:
        assert self._dense is not None, "the model is loaded"
        return self._dense

    def _plan_for(self, rows: Sequence[Row]) -> PipelinePlan:
        """The best plan, or the best with the dense weights as they lie if changing that would not pay."""
        drawn, workload, loaded = self._blueprint, workload_of(rows), self._loaded().plan
        known = routing_in(self._table, self.spec) if self._passes_learnt else None
        best = drawn.plan(workload, routing=known)
        if best.dense == loaded:
            return best
        try:
            kept = drawn.plan(workload, dense=loaded, routing=known)
        except BudgetError:
            return best
        return best if worth_changing(kept, best, disk_bytes_per_s=drawn.costs.layers.disk_bytes_per_s) else kept

    def _follow(self, plan: PipelinePlan, rows: Sequence[Row]) -> None:
        """Has everything lie and run as planned."""
        store = self._open()
        self._use_kv(plan, rows)
        give_back_freed_memory()
        self._use_dense(plan)
        store.resize(plan.num_slots)
        ahead = self._policy.ahead or plan.prefetch_experts
        self._runner.policy = replace(self._policy, ahead=ahead)
        self._listen(streams=plan.num_slots < sum(self.spec.experts_L))

    def _use_dense(self, plan: PipelinePlan) -> None:
        """Has the dense weights as planned; slots that experts lose by it go first. Closes the LLM on an error."""
        dense, store = self._loaded(), self._open()
        if dense.plan == plan.dense:
            return
        store.resize(min(plan.num_slots, store.num_slots))
        self._runner.dense = None
        try:
            dense.change(plan.dense)
        except BaseException:
            self.close()
            raise
        self._runner.dense = dense.stream

    def _use_kv(self, plan: PipelinePlan, rows: Sequence[Row]) -> None:
        """Opens what holds the caches that leave memory, as planned. Raises UsageError when they do not fit on the disk."""
        tier = self._blueprint.tier
        if plan.cache_on_disk and self._kv is None:
            directory = self._blueprint.options.scratch_directory
            self._kv = open_kv(directory) if tier is None else open_device_kv(tier)
        self._runner.kv = kv = self._kv if plan.cache_on_disk else None
        if kv is not None and tier is None:
            each = self._blueprint.pipeline.cache.movable_bytes_per_token
            needed = kv_file_bytes(self._blueprint.model, rows, plan.group, bytes_per_token=each)
            refuse_if_disk_is_full(kv, needed)


def _output(row: Row, prompt: Prompt) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(index=row.index, prompt=text, prompt_token_ids=row.prompt_ids, outputs=(row.completion(),))


def _open_store(drawn: Blueprint) -> ExpertStore:
    """A slot in service, and room for as many as the budget could ever hold."""
    if drawn.tier is not None:
        return open_device_store(drawn.tier, drawn.layout, converter_for(drawn.model), readers=READER_THREADS)
    experts_LE, slot_bytes = drawn.layout.experts_LE, drawn.pipeline.slot_bytes
    return open_disk_store(
        experts_LE,
        num_slots=1,
        slot_bytes=slot_bytes,
        capacity=max(1, min(sum(map(len, experts_LE)), drawn.budget_bytes // slot_bytes)),
        reader_threads=READER_THREADS,
        convert=converter_for(drawn.model),
    )
