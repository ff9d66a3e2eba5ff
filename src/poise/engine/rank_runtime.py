"""What runs on one rank of a group once weights are read: experts, passes, and what balances them, with the threads they have.

``load`` comes once, on all ranks at once; ``close`` and then ``free`` end it, however far ``load`` came. What a call of
``generate`` is made of is not here (``engine.parallel_llm``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poise.engine.balancing import Balancing
from poise.engine.blueprint import Blueprint
from poise.engine.lookahead_use import make_lookahead
from poise.engine.parallel_runner import Agreement, ParallelRunner
from poise.engine.planning import SHORTEST
from poise.engine.probe import probe
from poise.engine.rank_blueprint import RankBlueprint
from poise.engine.rank_recorder import RankRecorder
from poise.engine.stepwise import stepwise
from poise.model.dense import load_dense
from poise.model.seam import attach
from poise.model.weights import converter_for
from poise.parallel.courier import Courier
from poise.parallel.exchange import TokenExchange
from poise.parallel.group import RankGroup
from poise.parallel.host_rows import rehearse
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers
from poise.parallel.rank_experts import OnLoaded, RankExperts, experts_of
from poise.parallel.routes import Copies
from poise.parallel.step_balance import StepBalance


class RankRuntime:
    """``planned``: what to load; afterwards with what forwards of the model have shown. ``runner``, ``recorder``, ``migration``
    and ``balancing`` are there once it is loaded; ``balancing`` is None where experts stay where they are.

    ``tell`` and ``on_agreement``: of ``ParallelRunner``.
    """

    runner: ParallelRunner
    recorder: RankRecorder
    migration: Migration

    def __init__(
        self,
        group: RankGroup,
        planned: RankBlueprint,
        *,
        tell: Callable[[], Sequence[int]],
        on_agreement: Callable[[Agreement], None],
    ) -> None:
        self.planned = planned
        self.balancing: Balancing | None = None
        self.is_loaded = False
        self._group = group
        self._tell, self._on_agreement = tell, on_agreement
        self._experts: RankExperts | None = None
        self._courier = Courier(group.device)
        self._closes: list[Balancing | StepBalance | Migration | Courier] = [self._courier]
        """Last come, first closed."""

    @property
    def blueprint(self) -> Blueprint:
        """The model, with what this rank takes."""
        return self.planned.blueprint

    def load(self, on_loaded: OnLoaded | None, on_compile: Callable[[], None] | None) -> None:
        """Reads dense weights and this rank's experts; returns when all ranks have. ``on_compile``: is told when planners are
        about to be compiled, which takes long the first time on a machine. Raises BudgetError, RankLostError."""
        group, drawn = self._group, self.blueprint
        drawn.plan(SHORTEST)  # raises BudgetError where a rank's part does not fit
        load_dense(drawn.model, drawn.checkpoint, drawn.layout, drawn.dtype.dtype, group.device)
        attach(drawn.model)
        sources_LE = drawn.layout.experts_LE
        self.planned = planned = self.planned.corrected(probe(drawn.model, group.device))
        placement = planned.placement
        self._experts = experts = RankExperts(
            sources_LE,
            capacity=(len(placement.layers) + 1) * placement.slots_per_rank,
            convert=converter_for(drawn.model),
            device=group.device,
        )
        held_L = experts_of(placement, group.rank)
        experts.load(
            ((layer, expert) for layer, held in enumerate(held_L) for expert in sorted(held)), on_loaded=on_loaded
        )
        group.meet("done reading")  # what follows waits for all ranks, and would not hear Ctrl-C
        self.migration = Migration(group, experts, placement)
        self._closes.append(self.migration)
        layers = self._layers(experts)
        self.recorder = RankRecorder(group, len(placement.layers))
        self.runner = self._runner(layers)
        if on_compile is not None and planned.balances.name != "static":
            on_compile()
        group.first_alone("rows compiled", rehearse)
        self._balance(layers, experts)
        group.meet("loaded")
        self.is_loaded = True

    def close(self) -> None:
        """Ends all threads. The experts' memory stays, as messages may be under way in it until ranks have parted."""
        while self._closes:
            self._closes.pop().close()

    def free(self) -> None:
        """Gives the experts' memory back. Safe to call twice."""
        if self._experts is not None:
            self._experts.close()

    def _layers(self, experts: RankExperts) -> ExpertParallelLayers:
        group, drawn, placement = self._group, self.blueprint, self.planned.placement
        modules_L = [drawn.model.get_submodule(module.name) for module in drawn.modules]
        copies_L = [
            Copies.of(row_S, num_experts=placement.num_experts, num_ranks=placement.ranks)
            for row_S in placement.slot_to_expert_LS
        ]
        exchange = TokenExchange(group, hidden=drawn.spec.hidden, top_k=drawn.spec.top_k, dtype=drawn.dtype.dtype)
        return ExpertParallelLayers(modules_L, experts, exchange, copies_L, rank=group.rank)

    def _runner(self, layers: ExpertParallelLayers) -> ParallelRunner:
        drawn = self.blueprint
        return ParallelRunner(
            drawn.model,
            drawn.modules,
            self._group,
            layers,
            self.migration,
            courier=self._courier,
            recorder=self.recorder,
            top_k=drawn.spec.top_k,
            tell=self._tell,
            on_agreement=self._on_agreement,
        )

    def _balance(self, layers: ExpertParallelLayers, experts: RankExperts) -> None:
        """All ranks at once: makes what balances them ready, as far as anything does."""
        group, balances, curves = self._group, self.planned.balances, self.planned.curves
        if balances.policy is not None:
            self.balancing = Balancing(group, layers, self.migration, balances.policy, curves=curves)
            self._closes.append(self.balancing)
            self.balancing.get_ready()
        if balances.steps is not None:
            drawn = self.blueprint
            use, of_model = drawn.options.lookahead, (drawn.model, drawn.modules, drawn.sites, drawn.checkpoint)
            lookahead = None if use is None else make_lookahead(use, *of_model)
            balance, layers.learning = stepwise(
                group, experts, self.migration, balances.steps, drawn, lookahead=lookahead, curves=curves
            )
            layers.balance = balance
            self._closes.append(balance)
            balance.get_ready()
            self.recorder.balances_steps = True
