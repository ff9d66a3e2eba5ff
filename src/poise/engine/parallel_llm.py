"""``ParallelLLM``: one model over several ranks: attention for a rank's own requests, experts shared by all.

Every rank makes one with the same arguments; then rank 0 calls ``generate``, all others ``follow``. Requests are dealt out to
ranks. Weights are in memory: a rank's part of the experts that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import poise
from poise.engine.balances import Balances
from poise.engine.balancing import Balancing
from poise.engine.batch import Row
from poise.engine.blueprint import Options, draw_up
from poise.engine.first_placement import contiguous_for, curves_of, device_of, digest_of, opened, placed_by_speed
from poise.engine.footprint import return_freed_memory
from poise.engine.loop import Listeners, Loop, OnProgress
from poise.engine.parallel_call import Call, as_text, from_text
from poise.engine.parallel_runner import Agreement, ParallelRunner
from poise.engine.planning import SHORTEST, workload_of
from poise.engine.probe import probe
from poise.engine.prompts import as_list, params_for
from poise.engine.rank_blueprint import for_ranks, shard_bytes_of
from poise.engine.rank_device import budget_for, device_for, peak_bytes_on
from poise.engine.rank_recorder import RankRecorder
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.sampling import SamplingParams
from poise.engine.shares import deal
from poise.engine.stepwise import stepwise
from poise.engine.vibe import Vibe
from poise.errors import CheckpointError, UsageError
from poise.model.dense import load_dense
from poise.model.fingerprint import weights_fingerprint
from poise.model.int4_making import OnMade
from poise.model.seam import attach
from poise.model.weights import converter_for
from poise.parallel.courier import Courier
from poise.parallel.exchange import TokenExchange
from poise.parallel.group import RankGroup
from poise.parallel.handshake import facts_of, heard_by_others
from poise.parallel.launch import Launch
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers
from poise.parallel.rank_experts import OnLoaded, RankExperts, experts_of
from poise.parallel.routes import Copies
from poise.parallel.step_balance import StepBalance
from poise.parallel.step_options import StepOptions
from poise.parallel.timelines import RankTimeline, gather_timelines
from poise.parallel.watch import Patience
from poise.plan.pipeline import PipelinePlan
from poise.plan.rank_costs import RankCosts
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

    ``balance``: one of ``BALANCES``; ``policy``: how experts are placed while running, in place of the one of that name;
    ``steps``: how each step is balanced, likewise. Both together: experts move slowly behind, replicas come for each step.
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
        balance: str = "static",
        policy: Rebalance | None = None,
        steps: StepOptions | None = None,
        redundant_slots: int | None = None,
        placement: Placement | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
        patience: Patience | None = None,
        on_loaded: OnLoaded | None = None,
        on_made: OnMade | None = None,
    ) -> None:
        self._group: RankGroup | None = None
        self._experts: RankExperts | None = None
        self._migration: Migration | None = None
        self._courier = Courier()
        self._balancing: Balancing | None = None
        self._step_balance: StepBalance | None = None
        self._plan: PipelinePlan | None = None
        self._last: Progress | None = None
        self._timelines: tuple[RankTimeline, ...] = ()
        self._calls = 0
        with heard_by_others(launch):
            self._balances = balances = Balances.of(balance, policy, steps)
            if redundant_slots is None:
                redundant_slots = balances.redundant_slots
            return_freed_memory()
            devices = opened(machine)
            own = device_of(devices, launch.rank)
            self._device = device_for(device, launch.local_rank)
            if self._device.type == "cuda" and quantize != "none":
                raise UsageError("quantize 'int4' is computed on CPUs only; leave it out, or give device cpu")
            if self._device.type == "cuda" and balances.steps is not None:
                raise UsageError("balance 'probe' runs on CPUs only; give another balance, or device cpu")
            asked = Options(
                memory=budget_for(memory, self._device, local_ranks=launch.local_ranks),
                device=self._device.type,
                dtype=dtype,
                groups=groups,
                quantize=quantize,
                machine=own,
                experts_stay=True,
            )
            drawn = draw_up(model, asked, on_made=on_made or _nobody, waits=True)
            self._curves: RankCosts | None = None
            first = placement or contiguous_for(drawn, launch.num_ranks, redundant_slots)
            if devices is not None and balances.uses_speed:
                self._curves = curves_of(devices, drawn, launch.num_ranks)
            if self._curves is not None and isinstance(balances.policy, Vibe):
                first = placement or placed_by_speed(first, self._curves, top_k=drawn.spec.top_k)
            self.placement = first
            self._blueprint = for_ranks(drawn, self.placement, replica_slots=balances.replica_slots)
            self._drawn = drawn
            options = {
                "dtype": drawn.dtype.dtype,
                "quantize": quantize,
                "device": self._device.type,
                "machine": digest_of(devices),
                "redundant slots": redundant_slots,
                "balance": balances.policy or "static",
                "steps": balances.steps or "as they are",
            }
            facts = facts_of(
                weights_fingerprint(drawn.checkpoint), self.placement, version=poise.__version__, options=options
            )
        self._group = RankGroup(launch, facts, patience=patience, device=self._device)
        try:
            self._load(on_loaded)
        except BaseException as error:
            self.close(error)
            raise

    def _load(self, on_loaded: OnLoaded | None) -> None:
        """Reads dense weights and this rank's experts; returns when all ranks have."""
        drawn, group, placement, balances = self._blueprint, self.group, self.placement, self._balances
        drawn.plan(SHORTEST)  # raises BudgetError where a rank's part does not fit
        load_dense(drawn.model, drawn.checkpoint, drawn.layout, drawn.dtype.dtype, group.device)
        slots = (len(placement.layers) + 1) * placement.slots_per_rank
        sources_LE = drawn.layout.experts_LE
        attach(drawn.model)
        self._blueprint = drawn = for_ranks(
            self._drawn.corrected(probe(drawn.model, group.device)), placement, replica_slots=balances.replica_slots
        )
        self._experts = RankExperts(sources_LE, capacity=slots, convert=converter_for(drawn.model), device=group.device)
        held_L = experts_of(placement, group.rank)
        self._experts.load(
            ((layer, expert) for layer, held in enumerate(held_L) for expert in sorted(held)), on_loaded=on_loaded
        )
        group.meet("done reading")  # what follows waits for all ranks, and would not hear Ctrl-C
        self._migration = Migration(group, self._experts, placement)
        modules_L = [drawn.model.get_submodule(module.name) for module in drawn.modules]
        copies_L = [
            Copies.of(row_S, num_experts=placement.num_experts, num_ranks=placement.ranks).to(group.device)
            for row_S in placement.slot_to_expert_LS
        ]
        dtype = drawn.dtype.dtype
        exchange = TokenExchange(group, hidden=drawn.spec.hidden, top_k=drawn.spec.top_k, dtype=dtype)
        layers = ExpertParallelLayers(modules_L, self._experts, exchange, copies_L, rank=group.rank)
        self._recorder = RankRecorder(group, len(modules_L))
        self._runner = ParallelRunner(
            drawn.model,
            drawn.modules,
            group,
            layers,
            self._migration,
            courier=self._courier,
            recorder=self._recorder,
            top_k=drawn.spec.top_k,
            tell=self._tell,
            on_agreement=self._hear,
        )
        if balances.policy is not None:
            self._balancing = Balancing(group, layers, self._migration, balances.policy, curves=self._curves)
            self._balancing.get_ready()
        if balances.steps is not None:
            self._step_balance = stepwise(
                group, self._experts, self._migration, balances.steps, drawn, curves=self._curves
            )
            self._step_balance.get_ready()
            layers.balance, self._recorder.balances_steps = self._step_balance, True
        group.meet("loaded")

    @property
    def group(self) -> RankGroup:
        """The ranks."""
        assert self._group is not None, "this ParallelLLM is closed"
        return self._group

    @property
    def runner(self) -> ParallelRunner:
        """The passes, for measurements beside ``generate``."""
        return self._runner

    @property
    def last_progress(self) -> Progress | None:
        """The final figures of the last call of ``generate``, of all ranks together; None except on rank 0."""
        return self._last

    @property
    def figures(self) -> RankFigures | None:
        """How even the ranks were in the last call of ``generate``, and where their time went; None except on rank 0."""
        return self._recorder.figures

    @property
    def step_figures(self) -> StepFigures | None:
        """What balancing each step did in that call; None except on rank 0, and where steps are not balanced."""
        return self._recorder.step_figures

    @property
    def timelines(self) -> tuple[RankTimeline, ...]:
        """What every rank did in the last call, if that was asked for; empty except on rank 0."""
        return self._timelines

    def describe(self) -> dict[str, object]:
        """Plain numbers about the model, the ranks and, after a call of ``generate``, this rank's plan."""
        drawn, placement, plan = self._blueprint, self.placement, self._plan
        facts: dict[str, object] = {
            "architecture": drawn.spec.architecture,
            "ranks": placement.ranks,
            "moe_layers": len(drawn.spec.moe_layers),
            "experts_per_layer": placement.num_experts,
            "slots_per_rank": placement.slots_per_rank,
            "top_k": drawn.spec.top_k,
            "dense_bytes": drawn.spec.dense_bytes,
            "shard_bytes": shard_bytes_of(drawn, placement, replica_slots=self._balances.replica_slots),
            "dtype": drawn.spec.dtype,
            "dtype_reason": drawn.dtype.reason,
            "balance": self._balances.name,
            "budget_bytes": drawn.budget_bytes,
            "base_bytes": drawn.base_bytes,
        }
        if plan is not None:
            facts |= {"batch_size": plan.group.batch_size, "num_batches": plan.group.num_batches}
        return facts

    @property
    def balancing(self) -> Balancing | None:
        """What was observed of the ranks, and what moved; None where experts stay where they are."""
        return self._balancing

    @property
    def budget_bytes(self) -> int:
        """What everything that this rank adds after the imports may take."""
        return self._blueprint.budget_bytes

    @property
    def base_bytes(self) -> int:
        """What this rank's process held before the model began to load."""
        return self._blueprint.base_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of this rank's process since the model began to load; on a GPU, of what was taken there."""
        return peak_bytes_on(self._device, base_bytes=self._blueprint.base_bytes)

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
        return [self._blueprint.row(index, prompt, each) for index, (prompt, each) in enumerate(asked)]

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
        self._recorder.begin()
        self._runner.timeline = timeline = Timeline() if with_timeline else None
        mine = deal([row.total_tokens for row in rows], group.num_ranks)[group.rank]
        if mine:
            self._run([rows[index] for index in mine], call)
        self._runner.join()
        self._runner.timeline = None
        self._recorder.gather()
        self._timelines = () if timeline is None else gather_timelines(group, timeline.spans)
        return call

    def _run(self, rows: Sequence[Row], call: Call) -> None:
        """This rank's share of a call."""
        drawn = self._blueprint
        self._plan = plan = drawn.plan(workload_of(rows))
        pad_id = min((token for token in drawn.end_tokens if 0 <= token < drawn.spec.vocabulary), default=0)
        group = self.group
        loop = Loop(self._runner, plan.group, rows, eos=drawn.end_tokens, pad_id=pad_id, device=group.device)
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
            if error is None and self._migration is not None:
                if group.is_first:
                    group.put(f"call/{self._calls}", _END)
                self._migration.wind_up()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                group.give_up(error)
            for owned in (self._balancing, self._step_balance, self._migration, self._courier):
                if owned is not None:
                    owned.close()
            group.__exit__(None if error is None else type(error), error, None)
            if self._experts is not None:
                self._experts.close()

    def __enter__(self) -> ParallelLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def _tell(self) -> Sequence[int]:
        proposes = self._balancing is not None and self.group.is_first and self._balancing.has_proposal
        return int(proposes), *self._call.told()

    def _hear(self, agreement: Agreement) -> None:
        if self._recorder.is_full:
            self._recorder.gather()
        if self._balancing is not None:
            self._balancing.step(proposed=bool(agreement.told_RN[0][0]))
        self._call.heard([told for _, *told in agreement.told_RN])


def _nobody(done: int, total: int) -> None:
    """Is told of a 4-bit store that is made, where rank 0 shows it."""
