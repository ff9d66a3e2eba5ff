"""``ParallelLLM``: one model over several ranks: attention for a rank's own requests, experts shared by all.

Every rank makes one with the same arguments; then rank 0 calls ``generate``, all others ``follow``. Requests are dealt out to
ranks. Weights are in memory: a rank's part of the experts that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import poise
from poise.engine.balances import AUTO
from poise.engine.balancing import Balancing
from poise.engine.batch import Row
from poise.engine.footprint import return_freed_memory
from poise.engine.loop import Listeners, Loop, OnProgress
from poise.engine.parallel_call import Call, as_text, from_text
from poise.engine.parallel_runner import Agreement, ParallelRunner
from poise.engine.planning import workload_of
from poise.engine.prompts import as_list, params_for
from poise.engine.rank_blueprint import RankOptions, draw_up_for_rank
from poise.engine.rank_device import peak_bytes_on
from poise.engine.rank_runtime import RankRuntime
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.sampling import SamplingParams
from poise.engine.shares import deal
from poise.errors import CheckpointError
from poise.model.fingerprint import weights_fingerprint
from poise.model.int4_making import OnMade
from poise.parallel.group import RankGroup
from poise.parallel.handshake import facts_of, heard_by_others
from poise.parallel.launch import Launch
from poise.parallel.rank_experts import OnLoaded
from poise.parallel.step_options import StepOptions
from poise.parallel.timelines import RankTimeline, gather_timelines
from poise.parallel.watch import Patience
from poise.plan.pipeline import PipelinePlan
from poise.plan.rebalance import Rebalance
from poise.report.rank_figures import RankFigures
from poise.report.step_figures import StepFigures
from poise.spec.machine import Machine
from poise.spec.placement import Placement
from poise.spec.timeline import Timeline

_END = "end"
"""In place of a call: there will be no other."""


class ParallelLLM:
    """A model loaded on this rank. Parameters as those of ``LLM`` of the same names; ``memory`` is each rank's own budget,
    ``auto`` an even part of what its host has free.

    ``balance``: one of ``BALANCES``; "auto" is "probe" for several ranks on CPUs, else "static". ``policy``: how experts are
    placed while running, in place of the one of that name; ``steps``: how each step is balanced, likewise. Both together:
    experts move slowly behind, replicas come for each step.
    ``redundant_slots``: copies of experts that each rank holds in each layer beyond its even share; None: 2 where experts
    are balanced, else none. ``placement``: who holds which expert at first; None: contiguous, as every engine starts, or by
    the speeds of ``machine`` where experts are placed by speed ("vibe"). ``machine``: a device for each rank, in order,
    repeated where there are fewer.

    Raises RanksError for ranks that do not run the same thing, RankLostError when one is lost, UsageError (CheckpointError,
    BudgetError) for what cannot run.
    """

    def __init__(
        self,
        model: str | Path,
        launch: Launch,
        *,
        memory: str | int = "auto",
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        machine: Machine | str | Path | None = None,
        balance: str = AUTO,
        policy: Rebalance | None = None,
        steps: StepOptions | None = None,
        redundant_slots: int | None = None,
        placement: Placement | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
        patience: Patience | None = None,
        on_loaded: OnLoaded | None = None,
        on_made: OnMade | None = None,
        on_compile: Callable[[], None] | None = None,
    ) -> None:
        self._group: RankGroup | None = None
        self._plan: PipelinePlan | None = None
        self._last: Progress | None = None
        self._timelines: tuple[RankTimeline, ...] = ()
        self._calls = 0
        options = RankOptions(
            memory=memory,
            device=device,
            dtype=dtype,
            quantize=quantize,
            machine=machine,
            balance=balance,
            policy=policy,
            steps=steps,
            redundant_slots=redundant_slots,
            placement=placement,
            groups=groups,
        )
        with heard_by_others(launch):
            return_freed_memory()
            planned = draw_up_for_rank(model, launch, options, on_made=on_made)
            self.placement = planned.placement
            facts = facts_of(
                weights_fingerprint(planned.drawn.checkpoint),
                planned.placement,
                version=poise.__version__,
                options=planned.compared,
            )
        self._group = RankGroup(launch, facts, patience=patience, device=planned.device, carrier=planned.carrier)
        self.runtime = RankRuntime(self._group, planned, tell=self._tell, on_agreement=self._hear)
        """What runs, for measurements beside ``generate``."""
        try:
            self.runtime.load(on_loaded, on_compile)
        except BaseException as error:
            self.close(error)
            raise

    @property
    def group(self) -> RankGroup:
        """The ranks."""
        assert self._group is not None, "this ParallelLLM is closed"
        return self._group

    @property
    def runner(self) -> ParallelRunner:
        """The passes, for measurements beside ``generate``."""
        return self.runtime.runner

    @property
    def last_progress(self) -> Progress | None:
        """The final figures of the last call of ``generate``, of all ranks together; None except on rank 0."""
        return self._last

    @property
    def figures(self) -> RankFigures | None:
        """How even the ranks were in the last call of ``generate``, and where their time went; None except on rank 0."""
        return self.runtime.recorder.figures

    @property
    def step_figures(self) -> StepFigures | None:
        """What balancing each step did in that call; None except on rank 0, and where steps are not balanced."""
        return self.runtime.recorder.step_figures

    @property
    def predictor(self) -> str | None:
        """Who says what a layer's tokens will choose before its router does; None where steps are not balanced."""
        balance = self.runner.layers.balance
        return None if balance is None else balance.predictor

    @property
    def timelines(self) -> tuple[RankTimeline, ...]:
        """What every rank did in the last call, if that was asked for; empty except on rank 0."""
        return self._timelines

    def describe(self) -> dict[str, object]:
        """Plain numbers about the model, the ranks and, after a call of ``generate``, this rank's plan."""
        planned, placement, plan = self.runtime.planned, self.placement, self._plan
        drawn = planned.blueprint
        facts: dict[str, object] = {
            "architecture": drawn.spec.architecture,
            "ranks": placement.ranks,
            "device": str(planned.device),
            "exchanges": str(planned.carrier),
            "moe_layers": len(drawn.spec.moe_layers),
            "experts_per_layer": placement.num_experts,
            "slots_per_rank": placement.slots_per_rank,
            "top_k": drawn.spec.top_k,
            "dense_bytes": drawn.spec.dense_bytes,
            "shard_bytes": planned.shard_bytes,
            "dtype": drawn.spec.dtype,
            "dtype_reason": drawn.dtype.reason,
            "balance": planned.balances.name,
            "balance_reason": planned.balances.reason,
            "budget_bytes": drawn.budget_bytes,
            "base_bytes": drawn.base_bytes,
        }
        if self.predictor is not None:
            facts["predictor"] = self.predictor
        if plan is not None:
            facts |= {"batch_size": plan.group.batch_size, "num_batches": plan.group.num_batches}
        return facts

    @property
    def balancing(self) -> Balancing | None:
        """What was observed of the ranks, and what moved; None where experts stay where they are."""
        return self.runtime.balancing

    @property
    def budget_bytes(self) -> int:
        """What everything that this rank adds after the imports may take."""
        return self.runtime.blueprint.budget_bytes

    @property
    def base_bytes(self) -> int:
        """What this rank's process held before the model began to load."""
        return self.runtime.blueprint.base_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of this rank's process since the model began to load; on a GPU, of what was taken there."""
        return peak_bytes_on(self.runtime.planned.device, base_bytes=self.runtime.blueprint.base_bytes)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_result: Callable[[RequestOutput], None] | None = None,
        on_progress: OnProgress | None = None,
        with_timelines: bool = False,
    ) -> list[RequestOutput]:
        """On rank 0, while the others ``follow``: generates for all prompts. Results in input order; ``on_result`` is told of
        each as it finishes anywhere, ``on_progress`` of every pass. ``with_timelines``: all ranks write down what they do;
        afterwards ``timelines`` has it.

        Raises PromptError and BudgetError as ``LLM`` does, RankLostError when a rank is lost.
        """
        assert self.group.is_first, "the other ranks follow"
        listed = as_list(prompts)
        params = params_for(listed, sampling_params)
        rows = self._rows(listed, params)
        if not rows:
            return []
        self.group.put(f"call/{self._calls}", as_text(rows, with_timeline=with_timelines))
        call = self._take_part(rows, listed, on_result, on_progress, with_timelines)
        self._last = call.progress
        return [call.results[index] for index in range(len(rows))]

    def follow(self) -> None:
        """On every rank but 0: takes part in all calls of ``generate`` there, until it is closed."""
        while (text := self.group.hear(f"call/{self._calls}")) != _END:
            listed, params, with_timeline = from_text(text)
            self._take_part(self._rows(listed, params), listed, None, None, with_timeline)

    def _rows(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Row]:
        asked = zip(prompts, params, strict=True)
        return [self.runtime.blueprint.row(index, prompt, each) for index, (prompt, each) in enumerate(asked)]

    def _take_part(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        on_result: Callable[[RequestOutput], None] | None,
        on_progress: OnProgress | None,
        with_timeline: bool,
    ) -> Call:
        """Runs this rank's share of a call, and the others' experts until they are done."""
        group = self.group
        self._call = call = Call(group, prompts, number=self._calls, on_result=on_result, on_progress=on_progress)
        self._calls += 1
        self.runtime.recorder.begin()
        self.runtime.runner.timeline = timeline = Timeline() if with_timeline else None
        mine = deal([row.total_tokens for row in rows], group.num_ranks)[group.rank]
        if mine:
            self._run([rows[index] for index in mine], call)
        self.runtime.runner.join()
        self.runtime.runner.timeline = None
        self.runtime.recorder.gather()
        self._timelines = () if timeline is None else gather_timelines(group, timeline.spans)
        return call

    def _run(self, rows: Sequence[Row], call: Call) -> None:
        """This rank's share of a call."""
        drawn = self.runtime.blueprint
        self._plan = plan = drawn.plan(workload_of(rows))
        pad_id = min((token for token in drawn.end_tokens if 0 <= token < drawn.spec.vocabulary), default=0)
        group = self.group
        loop = Loop(self.runner, plan.group, rows, eos=drawn.end_tokens, pad_id=pad_id, device=group.device)
        try:
            loop.run(Listeners(on_row=call.finished, on_progress=call.advanced))
        except FloatingPointError as error:
            raise CheckpointError(f"{error}; try another --dtype, or fetch the checkpoint again") from None

    def close(self, error: BaseException | None = None) -> None:
        """Leaves the group, with ``error`` as the reason the others are given, and ends all threads. Safe to call twice."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            if error is None and self.runtime.is_loaded:
                if group.is_first:
                    group.put(f"call/{self._calls}", _END)
                self.runtime.migration.wind_up()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                group.give_up(error)
            self.runtime.close()
            group.__exit__(None if error is None else type(error), error, None)
            self.runtime.free()

    def __enter__(self) -> ParallelLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def _tell(self) -> Sequence[int]:
        balancing = self.balancing
        proposes = balancing is not None and self.group.is_first and balancing.has_proposal
        return int(proposes), *self._call.told()

    def _hear(self, agreement: Agreement) -> None:
        if self.runtime.recorder.is_full:
            self.runtime.recorder.gather()
        if self.balancing is not None:
            self.balancing.step(proposed=bool(agreement.told_RN[0][0]))
        self._call.heard([told for _, *told in agreement.told_RN])
