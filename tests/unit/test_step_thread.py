"""A look ahead: what is predicted is told, planned alike on all ranks, and fetched; one that comes too late does no harm."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

from poise.parallel.replica_fetch import Wanted
from poise.parallel.replica_slots import ReplicaSlots
from poise.parallel.step_ahead import Foreseen, Planning, Spoken
from poise.parallel.step_news import RankNews
from poise.parallel.step_planner import Links, StepPlanner
from poise.parallel.step_thread import THREAD_NAME, OnThread
from poise.parallel.step_windows import Windows
from poise.spec.timeline import AHEAD, Span, Timeline
from tests.balance_cases import EXPERT_BYTES, LINK, TOKEN_BYTES, costs_of
from tests.conftest import MakeCheckpoint, open_layout

LAYERS, RANKS, EXPERTS, TOKENS = 2, 2, 8, 600
ONES_R = np.ones(RANKS)
NEXT, AFTER = 1, 0
HOT_E = np.array([300, 250, 10, 10, 10, 10, 5, 5])
"""Experts 0 and 1 are both on rank 0."""


class Room:
    """Where all ranks tell each other a row: the links of ranks that are threads."""

    def __init__(self) -> None:
        self._rows: dict[int, np.ndarray] = {}
        self.all_here = threading.Barrier(RANKS, timeout=10)
        self.delay_s = 0.0

    def tell_all(self, rank: int, row_N: np.ndarray) -> np.ndarray:
        time.sleep(self.delay_s)
        self.all_here.wait()
        self._rows[rank] = row_N
        self.all_here.wait()
        return np.stack([self._rows[each] for each in range(RANKS)])


@dataclass
class RoomDoor:
    room: Room
    rank: int
    is_closed: bool = False

    def tell_all(self, row_N: np.ndarray) -> np.ndarray:
        return self.room.tell_all(self.rank, row_N)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Told:
    """Expects what it is given, and remembers who asked."""

    guess_E: np.ndarray
    threads: set[str] = field(default_factory=set)
    seen: list[tuple[int, int]] = field(default_factory=list)
    error: Exception | None = None
    name = "somebody"

    def saw(self, layer: int, own_E: np.ndarray) -> None:
        self.seen.append((layer, int(own_E.sum())))

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return self.guess_E if real_T is None else self.guess_E * int(real_T.any())


@dataclass
class Fetches:
    """What a track is asked to fetch."""

    begun: list[tuple[int, list[int]]] = field(default_factory=list)

    def fetch(self, layer: int, wanted: list[Wanted]) -> None:
        self.begun.append((layer, [each.expert for each in wanted]))


@dataclass
class Rank:
    ahead: OnThread
    forecast: Told
    track: Fetches

    def look(self, layer: int = AFTER) -> None:
        """The router of that layer has spoken."""
        self.ahead.look(spoken(layer), is_wanted=True)

    def end(self, within_s: float = 5.0) -> Foreseen:
        """Once a plan is there, or that long."""
        look, deadline_s = self.ahead._look, time.monotonic() + within_s
        assert look is not None
        while look._foreseen is None and time.monotonic() < deadline_s:
            time.sleep(1e-3)
        return self.ahead.end()


@contextmanager
def two_ranks(layout: Any, guesses_RE: np.ndarray) -> Iterator[tuple[Room, list[Rank]]]:
    room, ranks = Room(), []
    for rank in range(RANKS):
        forecast, track = Told(guesses_RE[rank]), Fetches()
        planning = Planning(
            planner=planner(),
            windows=Windows(LAYERS, LINK * ONES_R, chunk_bytes=1000),
            slots=ReplicaSlots(layout.experts_LE, replica_slots=2),
            track=cast(Any, track),
            rank=rank,
            num_ranks=RANKS,
            num_layers=LAYERS,
        )
        ahead = OnThread(RoomDoor(room, rank), forecast, planning, device=torch.device("cpu"))
        ranks.append(Rank(ahead, forecast, track))
    try:
        yield room, ranks
    finally:
        for each in ranks:
            each.ahead.close()


def planner() -> StepPlanner:
    links = Links(bytes_per_s_R=LINK * ONES_R, token_bytes=round(TOKEN_BYTES), expert_bytes=round(EXPERT_BYTES))
    homes_LS = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    return StepPlanner(
        homes_LS, links, num_experts=EXPERTS, replica_slots=2, most_work=500, costs=costs_of(ONES_R, p=1.0)
    )


def spoken(layer: int) -> Spoken:
    choice_TK = torch.zeros(TOKENS, 1, dtype=torch.int64)
    own_E = np.bincount(choice_TK.flatten().numpy(), minlength=EXPERTS)
    news = RankNews(layer=layer, window_us=round(3e6 * EXPERT_BYTES / LINK))
    return Spoken(hidden_TH=torch.zeros(TOKENS, 4), choice_TK=choice_TK, own_E=own_E, news=news)


def ended(ranks: list[Rank]) -> list[Foreseen]:
    """Of a look behind the first layer."""
    for each in ranks:
        each.look()
    return [each.end() for each in ranks]


@pytest.fixture
def layout(checkpoint: MakeCheckpoint) -> Any:
    planner().rehearse()  # as ranks do before the first pass
    return open_layout(checkpoint("qwen3_moe"))[1]


def test_ranks_plan_alike_by_what_all_expect_and_fetch_at_once(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, 2 * HOT_E])) as (_, ranks):
        ended(ranks)  # of the first pass nothing is known of windows
        both = ended(ranks)
        assert [each.is_late for each in both] == [False, False]
        plans = [each.plan for each in both]
        assert plans[0] is not None and plans[1] is not None  # noqa: PT018
        assert plans[0].digest == plans[1].digest
        assert plans[0].pays
        assert len(plans[0].replica_N3) > 0
        for rank, (each, plan) in enumerate(zip(ranks, plans, strict=True)):
            assert each.track.begun[-1] == (NEXT, [expert for expert, _ in plan.mine]), f"on rank {rank}"
            assert each.forecast.seen == [(AFTER, TOKENS)] * 2
            (thread,) = each.forecast.threads
            assert thread.startswith(THREAD_NAME), "the computing thread predicts nothing"
            assert each.ahead.cpu_s > 0


def test_what_is_predicted_is_told_by_the_thread_and_there_for_comparison(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E[::-1]])) as (_, ranks):
        assert not ranks[0].ahead.look(spoken(AFTER), is_wanted=True).any()
        ranks[1].look()
        for each, guess_E in zip(ranks, (HOT_E, HOT_E[::-1]), strict=True):
            foreseen = each.end()
            assert foreseen.guess_E is not None
            np.testing.assert_array_equal(foreseen.guess_E, guess_E)
            assert foreseen.pairs == 2 * HOT_E.sum()


def test_a_layer_that_begins_before_its_plan_is_there_gets_none(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        ended(ranks)
        room.delay_s = 0.3
        for each in ranks:
            each.look()
        early = ranks[0].ahead.end()
        assert early.plan is None
        assert early.is_late
        assert early.may_pay, "the other rank may have a plan"
        ranks[1].end(within_s=0.7)
        assert [layer for layer, _ in ranks[0].track.begun] == [NEXT], "of the first pass: nothing is fetched any more"


def test_who_hears_that_a_rank_is_too_late_fetches_nothing(layout: Any) -> None:
    """Rank 0 has two looks on hand, and has begun the second layer before its thread comes to it."""
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        ended(ranks)
        room.delay_s = 0.2
        for each in ranks:
            each.look(NEXT)
        for each in ranks:
            each.look(AFTER)
        first = ranks[0].ahead.end()
        assert first.plan is None
        assert first.is_late
        assert first.guess_E is None, "nothing is predicted for a layer that has begun"
        before = len(ranks[1].track.begun)
        second = ranks[1].end(within_s=1.5)
        assert second.plan is None
        assert second.is_late
        np.testing.assert_array_equal(second.guess_E, HOT_E)  # type: ignore[arg-type]
        assert [layer for layer, _ in ranks[1].track.begun[before:]] in ([AFTER], [])


def test_a_dropped_plan_is_not_missed(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        room.delay_s = 0.1
        for each in ranks:
            each.look()
            each.ahead.drop()
            foreseen = each.ahead.end()
            assert foreseen.plan is None
            assert (foreseen.is_late, foreseen.may_pay) == (False, False)
        again = ranks[0].ahead.end()
        assert (again.plan, again.guess_E, again.is_late) == (None, None, False)


def test_a_look_that_is_not_wanted_is_none_and_all_ranks_know(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (_, ranks):
        for each in ranks:
            assert not each.ahead.look(spoken(AFTER), is_wanted=False).any()
            foreseen = each.ahead.end()
            assert (foreseen.plan, foreseen.may_pay, foreseen.is_late) == (None, False, False)
        ranks[0].ahead.close()
        assert ranks[0].forecast.seen == [(AFTER, TOKENS)], "what was is known all the same"


def test_while_no_look_is_on_hand_the_thread_learns_a_step_at_a_time(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (_, ranks):
        ahead, allowed, began, goes_on = ranks[0].ahead, [3], threading.Event(), threading.Event()

        def learn() -> bool:
            if not allowed[0]:
                return False
            allowed[0] -= 1
            began.set()
            goes_on.wait(5)
            return True

        ahead.timeline = timeline = Timeline()
        ahead._learn = learn
        ahead.submit(lambda: None)
        assert began.wait(5)
        done = ahead.submit(lambda: timeline.spans.append(Span(AHEAD, "asked for", 0, 0)))
        goes_on.set()
        done.result(5)
        assert [span.name for span in timeline.spans] == ["learn", "asked for", "learn", "learn"]


def test_new_costs_reach_the_threads_planner_before_the_next_look(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (_, ranks):
        ended(ranks)
        for each in ranks:
            each.ahead.change(partial(StepPlanner.set_costs, costs=None))
        assert [each.plan for each in ended(ranks)] == [None, None], "nothing can be planned without costs"


def test_what_breaks_a_look_comes_out_at_the_next(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        room.all_here.abort()
        ranks[0].forecast.error = ValueError("no router")
        ranks[0].look()
        time.sleep(0.2)
        assert cast(RoomDoor, ranks[0].ahead._rows).is_closed, "no later row is taken for the one that is missing"
        with pytest.raises(ValueError, match="no router"):
            ranks[0].look()


def test_what_breaks_the_last_look_is_said(layout: Any, caplog: pytest.LogCaptureFixture) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        room.all_here.abort()
        ranks[0].forecast.error = ValueError("no router")
        ranks[0].look()
    assert "looking ahead has failed: no router" in caplog.text


def test_a_late_look_holds_no_hidden_states(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (room, ranks):
        room.delay_s = 0.2
        one = spoken(AFTER)
        hidden_TH = weakref.ref(one.hidden_TH)
        ranks[0].look(NEXT)
        ranks[0].ahead.end()
        ranks[0].ahead.look(one, is_wanted=True)  # behind the one that is still to be told
        ranks[0].ahead.end()
        del one
        assert hidden_TH() is None
        room.all_here.abort()


def test_each_part_of_a_look_is_in_the_timeline(layout: Any) -> None:
    with two_ranks(layout, np.stack([HOT_E, HOT_E])) as (_, ranks):
        ranks[0].ahead.timeline = timeline = Timeline()
        ended(ranks)
    assert [(span.track, span.name) for span in timeline.spans] == [
        (AHEAD, "predict"),
        (AHEAD, "tell"),
        (AHEAD, "plan"),
    ]
