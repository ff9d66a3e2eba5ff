"""Who plans the layer to come: asked when a router has spoken, and for what has come of it when the next layer begins.

``Inline``: the computing thread predicts before ranks tell each other counts, and plans while rows travel. ``step_thread`` has
the other way: a thread beside it. Either way all ranks make the same plan of the same news, and its replicas come behind
compute. Letters: T tokens, H hidden, K choices, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from poise.parallel.forecast import Forecast
from poise.parallel.plan_trust import promised_s
from poise.parallel.replica_slots import ReplicaSlots
from poise.parallel.replica_track import ReplicaTrack
from poise.parallel.step_news import Ints, RankNews, StepNews
from poise.parallel.step_plan import StepPlan
from poise.parallel.step_planner import StepPlanner
from poise.parallel.step_windows import Windows
from poise.plan.balance import BalancePlan
from poise.spec.timeline import Timeline

PlannerChange = Callable[[StepPlanner], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spoken:
    """A router has: its input, ``choice_TK`` of this rank's tokens (on the host; E where there is no choice), their counts
    ``own_E``, and what the rank tells the others with them."""

    hidden_TH: torch.Tensor
    choice_TK: torch.Tensor
    own_E: Ints
    news: RankNews

    def predicted_E(self, forecast: Forecast, following: int) -> Ints:
        """Counts of the same tokens at the layer to come."""
        is_padded = self.own_E.sum() < self.choice_TK.numel()
        real_T = (self.choice_TK < len(self.own_E)).any(dim=1).to(self.hidden_TH.device) if is_padded else None
        return forecast.counts_E(following, self.hidden_TH, real_T)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Foreseen:
    """For a layer that begins. ``plan``: whose replicas have been on their way; None: without. ``may_pay``: whether any rank
    may have a plan that pays, as all ranks know alike. ``promised_s``: gained by the plan for ``pairs`` (token, expert) pairs.
    ``guess_E``: predicted counts of this rank's tokens; None: not known. ``is_late``: no plan was there in time."""

    plan: StepPlan | None = None
    may_pay: bool = False
    promised_s: float = 0.0
    pairs: int = 0
    guess_E: Ints | None = None
    is_late: bool = False


class Foresight(Protocol):
    """Of one rank. All on its computing thread, and all but ``close`` on all ranks alike."""

    here: str
    """What a look is on the computing thread, for timelines."""
    cpu_s: float
    """Processor time of a thread of its own."""
    timeline: Timeline | None

    @property
    def name(self) -> str:
        """Who predicts, for people."""
        ...

    def saw(self, layer: int, own_E: Ints) -> None:
        """A layer behind which nobody looks ahead."""

    def look(self, spoken: Spoken, *, is_wanted: bool) -> Ints:
        """Predicted counts to tell the others with the true ones; 0 where they hear them otherwise. ``is_wanted``: False: the
        layer to come does not pay as far as ranks know."""
        ...

    def rows_leave(self, news: StepNews) -> None:
        """What all have told; this thread has nothing else to do."""

    def end(self) -> Foreseen:
        """The next layer begins: what is not planned now never will be."""
        ...

    def drop(self) -> None:
        """The plan is of no use any more."""

    def change(self, change: PlannerChange) -> None:
        """The planner with which tokens are divided has been given this."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planning:
    """From what all ranks have told to replicas on their way, on one thread."""

    planner: StepPlanner
    windows: Windows
    slots: ReplicaSlots
    track: ReplicaTrack
    rank: int
    num_ranks: int
    num_layers: int

    def following(self, layer: int) -> int:
        return (layer + 1) % self.num_layers

    def plan(self, news: StepNews) -> tuple[BalancePlan | None, float]:
        """The same on all ranks, and what it promises; None while costs are not known."""
        window_s_R = self.windows.window_s_R(news, news.layer)
        copy_s_R = news.of("copy_us") / 1e3 / float(news.of("trust_permille")[0])
        plan = self.planner.plan(self.following(news.layer), news.predicted_RE, window_s_R, *news.fracs, copy_s_R)
        return plan, promised_s(plan, copy_s_R) if copy_s_R.any() else 0.0

    def begin(self, plan: BalancePlan | None, promised: float, news: StepNews) -> Foreseen:
        """Fetches this rank's."""
        if plan is None:
            return Foreseen()
        made = self.begun(plan, layer=self.following(news.layer))
        return Foreseen(plan=made, may_pay=plan.pays, promised_s=promised, pairs=int(news.predicted_RE.sum()))

    def begun(self, plan: BalancePlan, *, layer: int) -> StepPlan:
        """Its replicas for this rank are on their way from now on."""
        made = StepPlan.of(plan, layer=layer, rank=self.rank, half=self.slots.turn())
        self.track.fetch(layer, made.wanted(self.slots))
        return made


class Inline:
    """On the computing thread, with the planner that also divides tokens."""

    here = "predict"

    def __init__(self, forecast: Forecast, planning: Planning) -> None:
        self._forecast, self._planning = forecast, planning
        self._guess_E: Ints | None = None
        self._foreseen = Foreseen()
        self.cpu_s = 0.0
        self.timeline: Timeline | None = None

    @property
    def name(self) -> str:
        return self._forecast.name

    def saw(self, layer: int, own_E: Ints) -> None:
        self._forecast.saw(layer, own_E)

    def look(self, spoken: Spoken, *, is_wanted: bool) -> Ints:
        """Wanted or not: what is predicted goes with counts that are told anyway."""
        layer = spoken.news.layer
        self._forecast.saw(layer, spoken.own_E)
        self._guess_E = guess_E = spoken.predicted_E(self._forecast, self._planning.following(layer))
        return guess_E

    def rows_leave(self, news: StepNews) -> None:
        begun = self._planning.begin(*self._planning.plan(news), news)
        self._foreseen = replace(begun, guess_E=self._guess_E)

    def end(self) -> Foreseen:
        foreseen, self._foreseen = self._foreseen, Foreseen()
        return foreseen

    def drop(self) -> None:
        self._foreseen = Foreseen(guess_E=self._foreseen.guess_E)

    def change(self, change: PlannerChange) -> None:
        """It is the same planner."""

    def close(self) -> None:
        """Nothing is under way."""
