"""Klotski's constraint-sensitive planner: batch size, batches, lookahead and what lies in which tier, chosen together.

Group shapes are enumerated, each is fitted into the memory budget or dropped, and with it every way of the dense weights and
every K is timed (``plan.passes``); the fastest is taken. A plan that does not fit cannot be returned. Pure: numbers in, a
frozen plan out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from poise.errors import BudgetError
from poise.plan.candidates import Candidate, PipelineModel, candidates
from poise.plan.dense import DensePlan
from poise.plan.group import GroupShape
from poise.plan.passes import Held, LayerCosts, PassTime, PassTimer
from poise.plan.routing import Routing
from poise.plan.tiers import Placed, num_resident, tiers_of
from poise.plan.workload import Stage, Workload, decode_shape, stages
from poise.units import format_bytes

AHEAD = (1, 2, 4, 6, 8, 12, 20, 28, 44, 60)
"""Experts read ahead beyond those under way; and one in any case."""
ALTERNATIVES = 5
PATIENCE = 2
"""A further step in the same direction is tried so many times without gain: times are convex but for whole slots."""
CHANGE_FRAC = 0.05
"""Share of a run's time that a change of the dense weights must save."""
WORTH_FRAC = 0.01
"""A plan is preferred for its speed only where it is faster by more; else the simpler one is, and the one of less memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Another plan that fits, for the ranking."""

    group: GroupShape
    prefetch_experts: int
    num_slots: int
    cache_on_disk: bool
    streamed_layers: int
    predicted_tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlan:
    """What runs. Tokens per second count generated tokens over prefill and decode, as the paper does (section 6).

    ``prefetch_experts``: K, experts read before they are asked for. ``num_slots``: experts in memory at once. ``tiers``: what
    lies where. ``predicted_s``: all requests. ``decode``: the time of a pass in which every row decodes.
    ``bound_tokens_per_s``: with perfect overlap, disk or compute never idle: an ideal of this plan at the rates measured for
    the routing assumed. It is no limit of a run, whose disk or routing may be kinder than that.
    """

    group: GroupShape
    prefetch_experts: int
    num_slots: int
    dense: DensePlan
    cache_on_disk: bool
    budget_bytes: int
    cache_bytes: int
    activation_bytes: int
    experts_bytes: int
    tiers: tuple[Placed, ...]
    predicted_s: float
    predicted_tokens_per_s: float
    bound_tokens_per_s: float
    bottleneck: Literal["disk", "compute"]
    decode: PassTime
    alternatives: tuple[Alternative, ...] = ()

    @property
    def batch_size(self) -> int:
        """Rows in a batch: the paper's bs."""
        return self.group.batch_size

    @property
    def num_batches(self) -> int:
        """Batches that run in lockstep: the paper's n."""
        return self.group.num_batches

    @property
    def dense_bytes(self) -> int:
        """Memory of the dense weights, streamed layers' slots included."""
        return self.dense.memory_bytes

    @property
    def bound_frac(self) -> float:
        """What is predicted over what perfect overlap would give: at most 1, but for rounding."""
        return self.predicted_tokens_per_s / self.bound_tokens_per_s

    @property
    def memory_bytes(self) -> int:
        """What the plan takes of the budget."""
        return sum(each.nbytes for each in self.tiers if each.tier == "memory" and each.what != "not used")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    """A candidate with all memory that is left given to experts, and what it would take."""

    candidate: Candidate
    dense: DensePlan
    num_slots: int
    ahead: int
    seconds: float

    def rank(self, fastest_s: float, *, wants_large_passes: bool) -> tuple[float, ...]:
        """Speed in steps of ``WORTH_FRAC``, then simplicity, then large passes where they are wanted, then memory that is not
        needed for experts; then speed."""
        behind = math.floor(math.log(self.seconds / fastest_s) / WORTH_FRAC)
        simple = (len(self.dense.streamed), self.candidate.cache_on_disk, self.candidate.group.num_batches)
        large = self.candidate.group.pass_tokens if wants_large_passes else 0
        return behind, *simple, -large, self.candidate.working_bytes, self.seconds


def plan_pipeline(
    model: PipelineModel,
    costs: LayerCosts,
    workload: Workload,
    *,
    memory_bytes: int,
    routing: Routing | None = None,
    only: Sequence[tuple[int, int]] | None = None,
) -> PipelinePlan:
    """The fastest plan for ``workload`` that fits ``memory_bytes``.

    ``routing``: what was recorded, else uniform. ``only``: (batch size, batches) to choose among. Raises BudgetError, which
    names the smallest budget that works, when nothing fits.
    """
    search = _Search(model, costs, workload, memory_bytes, routing)
    smallest: Candidate | None = None
    fitted: list[_Fitted] = []
    for candidate in candidates(model, workload, only):
        if smallest is None or candidate.working_bytes < smallest.working_bytes:
            smallest = candidate
        fitted += search.fitted(candidate)
    assert smallest is not None, "there is always a candidate"
    if not fitted:
        raise _too_small(model, smallest, memory_bytes)
    enough = max(min(each.num_slots, model.wanted_slots) for each in fitted)
    fitted = [each for each in fitted if each.num_slots >= enough]
    fastest_s = min(each.seconds for each in fitted)
    best, *others = sorted(fitted, key=lambda each: each.rank(fastest_s, wants_large_passes=model.wants_large_passes))
    return search.plan(best, _alternatives(best, others, sum(workload.new_tokens)))


def worth_changing(kept: PipelinePlan, better: PipelinePlan, *, disk_bytes_per_s: float) -> bool:
    """Whether a run is so much faster with the dense weights as in ``better`` that changing them first pays.

    All that changes is read once; a prediction is not taken at its word for less than ``CHANGE_FRAC``.
    """
    moved_bytes = abs(kept.dense.bytes_per_pass - better.dense.bytes_per_pass)
    gain_s = kept.predicted_s - better.predicted_s
    return gain_s > max(2.0 * moved_bytes / disk_bytes_per_s, CHANGE_FRAC * kept.predicted_s)


class _Search:
    """Times what fits. One budget, one workload."""

    def __init__(
        self,
        model: PipelineModel,
        costs: LayerCosts,
        workload: Workload,
        memory_bytes: int,
        routing: Routing | None,
    ) -> None:
        self._model, self._workload, self._memory_bytes = model, workload, memory_bytes
        spec = model.spec
        chances = routing or Routing.uniform(spec.experts_L, spec.top_k)
        self._timer = PassTimer(
            costs, chances, expert_bytes=spec.expert_bytes, num_layers=spec.num_layers, under_way=model.under_way
        )
        self._stages: dict[GroupShape, list[Stage]] = {}

    def fitted(self, candidate: Candidate) -> Iterator[_Fitted]:
        """The best K for each way of the dense weights that fits, while the time falls from way to way."""
        best_s, since = math.inf, 0
        for dense in self._model.dense:
            left = self._memory_bytes - candidate.least_bytes(self._model, dense)
            if left < 0:
                continue
            found = self._best_ahead(candidate, dense, 1 + left // self._model.slot_bytes)
            yield found
            is_enough = found.num_slots >= self._model.wanted_slots
            since = 0 if found.seconds < best_s or not is_enough else since + 1
            best_s = min(best_s, found.seconds)
            if since >= PATIENCE or found.num_slots == self._model.most_slots:
                return

    def _best_ahead(self, candidate: Candidate, dense: DensePlan, num_slots: int) -> _Fitted:
        slots = min(num_slots, self._model.most_slots)
        best: _Fitted | None = None
        since = 0
        for ahead in sorted({1, *(self._model.under_way + each for each in AHEAD)}):
            if best is not None and (
                ahead > slots // 2 or since >= PATIENCE or slots == sum(self._model.spec.experts_L)
            ):
                break
            seconds, _ = self._seconds(candidate, self._held(candidate, dense, slots, ahead))
            if best is None or seconds < best.seconds * (1.0 - 1e-9):
                best = _Fitted(candidate=candidate, dense=dense, num_slots=slots, ahead=ahead, seconds=seconds)
                since = 0
            else:
                since += 1
        assert best is not None, "K = 1 is always tried"
        return best

    def plan(self, best: _Fitted, alternatives: tuple[Alternative, ...]) -> PipelinePlan:
        """All about the plan that was chosen."""
        model, candidate, dense = self._model, best.candidate, best.dense
        held = self._held(candidate, dense, best.num_slots, best.ahead)
        ideal = Held(
            resident=best.num_slots, ahead=best.ahead, streamed_bytes=dense.bytes_per_pass, cache_bytes_per_token=0
        )
        decode = self._timer.time(decode_shape(self._workload, candidate.group), held)
        tokens = sum(self._workload.new_tokens)
        return PipelinePlan(
            group=candidate.group,
            prefetch_experts=best.ahead,
            num_slots=best.num_slots,
            dense=dense,
            cache_on_disk=candidate.cache_on_disk,
            budget_bytes=self._memory_bytes,
            cache_bytes=candidate.cache_bytes,
            activation_bytes=candidate.activation_bytes,
            experts_bytes=best.num_slots * model.slot_bytes + model.scratch_bytes,
            tiers=tiers_of(
                model,
                candidate,
                dense,
                num_slots=best.num_slots,
                ahead=best.ahead,
                budget_bytes=self._memory_bytes,
            ),
            predicted_s=best.seconds,
            predicted_tokens_per_s=tokens / best.seconds,
            bound_tokens_per_s=tokens / self._seconds(candidate, ideal)[1],
            bottleneck="disk" if decode.disk_s >= decode.compute_s else "compute",
            decode=decode,
            alternatives=alternatives,
        )

    def _held(self, candidate: Candidate, dense: DensePlan, slots: int, ahead: int) -> Held:
        return Held(
            resident=num_resident(self._model, slots, ahead),
            ahead=ahead,
            streamed_bytes=dense.bytes_per_pass,
            cache_bytes_per_token=self._model.cache.movable_bytes_per_token if candidate.cache_on_disk else 0,
            slots=slots,
        )

    def _seconds(self, candidate: Candidate, held: Held) -> tuple[float, float]:
        """Of the whole workload: predicted, and with perfect overlap in every pass."""
        if candidate.group not in self._stages:
            self._stages[candidate.group] = list(stages(self._workload, candidate.group))
        total = limit = 0.0
        for stage in self._stages[candidate.group]:
            seconds, limit_s = self._timer.seconds(stage.shape, held)
            total += stage.passes * seconds
            limit += stage.passes * limit_s
        return total, limit


def _too_small(model: PipelineModel, smallest: Candidate, memory_bytes: int) -> BudgetError:
    dense_bytes = model.smallest_dense.memory_bytes
    needed = smallest.least_bytes(model, model.smallest_dense)
    working = needed - dense_bytes - model.slot_bytes
    return BudgetError(
        f"a {model.budget_name} of {format_bytes(memory_bytes)} is too small; the smallest that works is {needed} bytes "
        f"({format_bytes(needed)}): {format_bytes(dense_bytes)} dense weights, "
        f"{format_bytes(model.slot_bytes)} for one expert, {format_bytes(working)} to work in",
        smallest_bytes=needed,
    )


def _alternatives(best: _Fitted, others: Iterable[_Fitted], tokens: int) -> tuple[Alternative, ...]:
    """The best of every other (batch size, batches), for the ranking."""
    taken = {(best.candidate.group.batch_size, best.candidate.group.num_batches)}
    ranking: list[Alternative] = []
    for each in others:
        key = (each.candidate.group.batch_size, each.candidate.group.num_batches)
        if key in taken or len(ranking) == ALTERNATIVES:
            continue
        taken.add(key)
        ranking.append(
            Alternative(
                group=each.candidate.group,
                prefetch_experts=each.ahead,
                num_slots=each.num_slots,
                cache_on_disk=each.candidate.cache_on_disk,
                streamed_layers=len(each.dense.streamed),
                predicted_tokens_per_s=tokens / each.seconds,
            )
        )
    return tuple(ranking)
