"""PROBE while ranks run: predicts each next layer's counts, fetches replicas behind compute, divides true tokens over copies.

Life of a layer: counts (true ones of this layer, predicted ones of the next) go to all ranks in one exchange; true tokens are
divided over homes and those replicas that have come to all who should have them; while tokens travel the next layer is planned
(or beside: ``parallel.step_ahead``); while experts and the next attention compute its replicas come
(``parallel.replica_track``). Tokens follow the true router: a wrong guess costs balance, never outputs. The computing thread
calls everything here. Letters: T tokens, K choices, R ranks, E experts, N replicas, L layers.
Source: PROBE (arXiv 2602.00509), section 5.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from time import perf_counter

import numpy as np
import torch

from poise.model.layout import Weights
from poise.model.lookahead import counted_E
from poise.parallel.copy_cost import CopyCost
from poise.parallel.exchange import Coming
from poise.parallel.group import RankGroup
from poise.parallel.plan_trust import PlanTrust
from poise.parallel.routes import Copies, Routes, route, route_by
from poise.parallel.step_ahead import Foreseen, Foresight, PlannerChange, Planning, Spoken
from poise.parallel.step_costs import StepCosts
from poise.parallel.step_exposed import fetch_exposed
from poise.parallel.step_news import Ints, RankNews, StepNews, exchanged
from poise.parallel.step_note import StepNote, Travel
from poise.parallel.step_plan import StepPlan
from poise.parallel.step_planner import NO_REPLICAS, StepPlanner
from poise.plan.compiled import arithmetic
from poise.plan.step_looks import StepLooks
from poise.plan.step_rest import StepRest
from poise.spec.timeline import COMPUTE, EXCHANGE, Span, Timeline

logger = logging.getLogger(__name__)

KEEP = 0.9
"""Of what a layer is known to take, when another one has been balanced."""


class StepBalance:
    """Of one rank. ``planning``: with what tokens are divided. ``ahead``: None plans behind the router, and waits for the
    replicas. ``rest``: None: it never rests."""

    def __init__(
        self,
        group: RankGroup,
        planning: Planning,
        costs: StepCosts,
        copies: CopyCost,
        ahead: Foresight | None,
        *,
        num_experts: int,
        rest: StepRest | None = None,
    ) -> None:
        self._rest, self._looks = rest, StepLooks(planning.num_layers)
        self.rests = False
        """Whether the pass at hand runs as without balancing."""
        self._saved_s = self._spent_s = 0.0
        """In it so far."""
        self._look_s = 0.0
        """What predicting, planning and dividing of one layer have lately taken here."""
        self._group, self._rank = group, group.rank
        self._planning, self._planner = planning, planning.planner
        self.track, self._slots, self._windows = planning.track, planning.slots, planning.windows
        self._costs, self._copies, self._ahead = costs, copies, ahead
        self._num_experts = num_experts
        self._trust = PlanTrust()
        self._heard: StepNews | None = None
        self._computed = (0, 0, 0.0)
        self._permille = (1000, 1000)
        self._aux_s = 0.0
        self._is_alike = self._counts_again = False
        """Whether ranks are known to plan alike, and whether it has been said that they may not."""
        self.replicas: Mapping[int, Weights] = {}
        """By expert, those that compute in the layer at hand."""
        self.note = StepNote()
        """Of the layer at hand."""

    @property
    def predictor(self) -> str:
        """Who says what the next layer's tokens will choose."""
        return "nobody" if self._ahead is None else self._ahead.name

    @property
    def timeline(self) -> Timeline | None:
        """Gets spans of what is done here, on the track, and ahead."""
        return self.track.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self.track.timeline = timeline
        if self._ahead is not None:
            self._ahead.timeline = timeline

    def get_ready(self) -> None:
        """All ranks at once: returns when planners are compiled: by rank 0, whose machine code the others take. Raises
        RankLostError when a rank is lost meanwhile."""
        self._group.first_alone("planner compiled", self._planner.rehearse)
        self._group.meet("ready to balance")

    def told(self) -> tuple[int, int]:
        """What balancing the last pass saved (below 0: not known) and took on this rank, in microseconds."""
        saved_us = round(1e6 * self._saved_s) if self._planner.knows_costs else -1
        return saved_us, round(1e6 * self._spent_s)

    def begin_pass(
        self, slot_to_expert_LS: Ints, changed: Collection[int], *, tokens: int, told_R: Sequence[tuple[int, int]]
    ) -> None:
        """All ranks at once, before a pass over so many ``tokens``. ``changed``: layers of which experts have moved.

        ``told_R``: what each rank ``told``.
        """
        self._saved_s = self._spent_s = 0.0
        if self._rest is not None:
            saved_us, spent_us = np.mean(told_R, axis=0)
            self._rest.saw(None if saved_us < 0 else saved_us / 1e6, spent_us / 1e6)
            rested, self.rests = self.rests, not self._rest.begin(tokens)
            if rested and not self.rests:
                self._trust = PlanTrust()  # on trial
                self._looks.forget()
            if self.rests and not rested:
                self._windows.close()
                if self._ahead is not None:
                    self._ahead.end()
                self.track.end_fetch()
        if self._costs.begin_pass():
            self._change(partial(StepPlanner.set_costs, costs=self._costs.costs))
        self._looks.begin(tokens)
        for layer in changed:
            self._change(partial(StepPlanner.set_homes, layer=layer, slot_to_expert_S=slot_to_expert_LS[layer]))
            self._looks.forget(layer)
        if self._ahead is not None and 0 in changed:
            self._ahead.drop()  # a plan of homes that are no more
            self.track.end_fetch()

    def routes(
        self, layer: int, hidden_TH: torch.Tensor, choice_TK: torch.Tensor, copies: Copies
    ) -> tuple[Routes, Coming | None]:
        """All ranks at once: where this rank's tokens go, and how many rows come from each rank; None: nobody knows yet.

        ``choice_TK``: E where there is no choice.
        """
        began_s = perf_counter()
        self.note = note = StepNote()
        choice_TK = choice_TK.cpu()  # where counts and routes are found
        own_E = counted_E(choice_TK, self._num_experts)
        foreseen, bits = self._end_fetch(layer)
        plan, has_choice = foreseen.plan, self._planner.has_choice(layer)
        looks = not self._is_alike or self._looks.looks_at(self._planning.following(layer))
        if not (looks or has_choice or foreseen.may_pay or self._ahead is None):
            self._pass_over(layer, own_E, began_s)
            return route(choice_TK, copies, source_rank=self._rank, device=hidden_TH.device), None
        pays = has_choice or (plan is not None and plan.pays)
        home = None if pays else route(choice_TK, copies, source_rank=self._rank, device=hidden_TH.device)
        own = self._own_news(layer, len(hidden_TH), plan, bits, pays=pays)
        guess_E = self._look(Spoken(hidden_TH=hidden_TH, choice_TK=choice_TK, own_E=own_E, news=own), foreseen, looks)
        asked_s = perf_counter()
        news = exchanged(self._group, own, own_E, guess_E, None if home is None else home.sent_R)
        heard_s = perf_counter()
        note.told_s = heard_s - asked_s
        self._windows.end(layer)
        self._costs.saw(news)
        self._is_alike = news.is_same("arithmetic")
        self._heard = news
        came_N3, waited_s = NO_REPLICAS, 0.0
        if self._ahead is None:
            plan, came_N3, waited_s = fetch_exposed(self._group, self._planning, news, note)
        elif plan is not None:
            came_N3 = plan.came(news)
        self.replicas = {} if plan is None else plan.weights(self._slots, came_N3)
        note.home_pairs = self._planner.home_pairs(layer, news.counts_RE, self._rank)
        note.replicas_used = len(self.replicas)
        is_as_planned = 2 * abs(foreseen.pairs - news.pairs) <= foreseen.pairs
        divided = self._planner.dispatch(layer, news.counts_RE, came_N3, *news.fracs, rank=self._rank)
        saved_s, coming = 0.0 if divided is None else divided[2], None
        self._trust.saw(foreseen.promised_s if is_as_planned else 0.0, saved_s)
        if self._ahead is not None and news.of("plan").any():
            self._looks.saw(layer, pays=saved_s > float(news.of("look_us").mean()) / 1e6)
        if divided is None:
            routes = home or route(choice_TK, copies, source_rank=self._rank, device=hidden_TH.device)
            if not news.of("pays").any():
                coming = Coming(rows_R=tuple(news.rows_RR[:, self._rank].tolist()))
        else:
            dispatch, pairs_R, _ = divided
            self._saved_s += saved_s
            routes = route_by(choice_TK, dispatch, num_ranks=self._group.num_ranks, device=hidden_TH.device)
            if self._is_alike:
                most_R = np.minimum(pairs_R, news.of("tokens"))
                most_R[self._rank] = routes.sent_R[self._rank]
                coming = Coming(rows_R=tuple(most_R.tolist()), is_exact=False)
            elif not self._counts_again:
                self._counts_again = True
                logger.warning("ranks differ in processor, NumPy or numba: balanced layers count rows once more")
        ended_s = perf_counter()
        note.balance_s = ended_s - began_s - note.told_s - waited_s
        note.told_s += waited_s
        note.counts_s = waited_s
        self._spent_s += note.balance_s + waited_s
        self._show(layer, began_s, asked_s, heard_s, ended_s)
        return routes, coming

    def rows_leave(self) -> None:
        """Tokens are about to travel."""
        self.track.suspend()

    def plan_next(self) -> None:
        """While they do: replicas for the next layer, which come as soon as the link is free."""
        if self._heard is None:
            return  # nobody has told anything
        began_s = perf_counter()
        if self._ahead is not None:
            self._ahead.rows_leave(self._heard)
        took_s = perf_counter() - began_s
        self.note.balance_s += took_s
        self._look_s = (
            self.note.balance_s if not self._look_s else KEEP * self._look_s + (1.0 - KEEP) * self.note.balance_s
        )
        self._spent_s += took_s

    def rows_came(self) -> None:
        """The link is free while experts compute."""
        self._windows.open()
        self.track.resume()

    def outputs_leave(self) -> None:
        """Outputs are about to travel."""
        self._windows.close()
        self.track.suspend()

    def outputs_came(self) -> None:
        """The link is free until the next tokens travel."""
        self._windows.open()
        self.track.resume()

    def computed(self, *, pairs: int, active: int, seconds: float, travel: Travel) -> None:
        """What this rank has computed in the layer at hand, and what that took."""
        self._computed = pairs, active, seconds
        if self.note.rested:
            self.note.home_pairs = pairs
        self._permille = travel.permille
        self._slots.used()
        self.replicas = {}
        aux_s = self.track.cpu_s + (0.0 if self._ahead is None else self._ahead.cpu_s)
        self.note.aux_s, self._aux_s = aux_s - self._aux_s, aux_s
        taken_s = self._copies.saw(self.track.cpu_s, self.track.moved_bytes)
        self._spent_s += taken_s if self._ahead is not None else 0.0  # who waits for replicas has counted that

    def close(self) -> None:
        """Ends the threads."""
        if self._ahead is not None:
            self._ahead.close()
        self.track.close()

    def _change(self, change: PlannerChange) -> None:
        change(self._planner)
        if self._ahead is not None:
            self._ahead.change(change)

    def _show(self, layer: int, began_s: float, asked_s: float, heard_s: float, ended_s: float) -> None:
        if self.timeline is None:
            return
        looked = "count" if self._ahead is None else self._ahead.here
        parts = ((COMPUTE, looked, began_s, asked_s), (EXCHANGE, "counts", asked_s, heard_s))
        for track, name, begin_s, end_s in (*parts, (COMPUTE, "divide", heard_s, ended_s)):
            self.timeline.spans.append(Span(track, name, round(begin_s * 1e9), round(end_s * 1e9), {"layer": layer}))

    def _pass_over(self, layer: int, own_E: Ints, began_s: float) -> None:
        """As without balancing: no replica computes here, and nobody asks for one in the next layer."""
        assert self._ahead is not None, "who plans behind the router looks at each layer"
        self._ahead.saw(layer, own_E)
        self.note.rested, self.note.declined = 1, 0
        self._windows.end(layer)
        self._trust.saw(0.0, 0.0)
        self._heard, self.replicas = None, {}
        self.note.balance_s = perf_counter() - began_s
        self._spent_s += self.note.balance_s

    def _end_fetch(self, layer: int) -> tuple[Foreseen, int]:
        """What was foreseen of this layer, and which of its replicas are here."""
        self.track.check(self._group)
        foreseen = Foreseen() if self._ahead is None else self._ahead.end()
        fetched = self.track.end_fetch()
        if self._ahead is not None:
            self._windows.fetched(fetched, 1.0 if foreseen.plan is None else foreseen.plan.link_share)
        self.note.replica_bytes, self.note.late = fetched.nbytes, int(foreseen.is_late)
        plan = foreseen.plan
        if plan is None:
            return foreseen, 0
        assert plan.layer == layer, f"replicas of MoE layer {plan.layer} came for layer {layer}"
        self.note.declined = int(not plan.pays)
        self.note.replicas_planned = len(fetched.arrived)
        return foreseen, plan.arrived_bits(fetched)

    def _look(self, spoken: Spoken, foreseen: Foreseen, is_wanted: bool) -> Ints:
        """At the layer to come; and what the last look was worth."""
        if foreseen.guess_E is not None:
            self.note.guessed_wrong = int(np.abs(foreseen.guess_E - spoken.own_E).sum()) // 2
        if foreseen.guess_E is not None or self._ahead is None:
            self.note.own_pairs = int(spoken.own_E.sum())
        if self._ahead is None:
            return np.zeros(self._num_experts, dtype=np.int64)
        return self._ahead.look(spoken, is_wanted=is_wanted)

    def _own_news(self, layer: int, tokens: int, plan: StepPlan | None, bits: int, *, pays: bool) -> RankNews:
        pairs, active, seconds = self._computed
        self._computed = (0, 0, 0.0)
        return RankNews(
            layer=layer,
            tokens=tokens,
            arithmetic=arithmetic(),
            plan=0 if plan is None else plan.digest,
            pays=pays,
            arrived=bits,
            window_us=self._windows.window_us(self._planning.following(layer)),
            fetch_kb_s=self._windows.fetch_kb_s,
            copy_us=self._copies.copy_us,
            look_us=round(1e6 * self._look_s),
            trust_permille=self._trust.permille,
            in_permille=self._permille[0],
            out_permille=self._permille[1],
            pairs=pairs,
            active=active,
            compute_us=round(1e6 * seconds),
        )
