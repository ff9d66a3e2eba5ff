"""The layer to come planned on a thread of its own, for ranks with a core to spare (PROBE's auxiliary track).

The computing thread hands over what is known when a router has spoken; the thread predicts, tells the other ranks over links
of its own, plans with a planner of its own, and begins to fetch. Looks are taken one after the other, in the same order on
every rank, as are new costs and homes. Nobody waits for one: a layer that begins before its plan is there runs without
replicas, and where a rank tells that it has come so far nobody plans. A plan may be late on one rank and there on another, so
what all ranks must do alike goes by whether there was a look, and by what all have told. While no look is on hand the thread
learns. Letters: R ranks, E experts. Source: PROBE (arXiv 2602.00509), section 5. Decision 061.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import torch

from poise.parallel.courier import Courier
from poise.parallel.forecast import Forecast
from poise.parallel.step_ahead import Foreseen, PlannerChange, Planning, Spoken
from poise.parallel.step_news import Ints, RankNews, StepNews, told
from poise.spec.timeline import AHEAD, Span, Timeline

logger = logging.getLogger(__name__)

THREAD_NAME = "poise-ahead"
CLOSE_S = 1.0


class Rows(Protocol):
    """``parallel.row_links``."""

    def tell_all(self, row_N: Ints) -> Ints: ...

    def close(self) -> None: ...


class Look:
    """At one layer to come. ``spoken``: until that begins, or never will, so that late looks hold no hidden states.
    ``guess_E``: predicted counts of this rank's tokens; None: not yet."""

    def __init__(self, spoken: Spoken) -> None:
        self.spoken: Spoken | None = spoken
        self.guess_E: Ints | None = None
        self._lock = threading.Lock()
        self._foreseen: Foreseen | None = None

    def done(self, begin: Callable[[], Foreseen]) -> None:
        """What comes of it: ``begin`` is called if that is still of use."""
        with self._lock:
            if self.spoken is not None:
                self._foreseen = begin()

    def end(self, *, is_late: bool = True) -> Foreseen:
        """``is_late``: whether a plan that is not there yet is missed."""
        with self._lock:
            self.spoken = None
            foreseen = self._foreseen or Foreseen(is_late=is_late)
            return replace(foreseen, may_pay=True, guess_E=self.guess_E)


class OnThread:
    """Of one rank. ``forecast`` and ``planning``: used on this thread alone; ``rows``: closed at the end. ``learn``: makes a
    step if it may, and tells whether it did: called on the thread while nothing else is to do."""

    here = "hand over"

    def __init__(
        self,
        rows: Rows,
        forecast: Forecast,
        planning: Planning,
        *,
        device: torch.device,
        learn: Callable[[], bool] | None = None,
    ) -> None:
        self._rows, self._forecast, self._planning, self._learn = rows, forecast, planning, learn
        self._courier = Courier(device, name=THREAD_NAME)
        self._under_way: deque[Future[None]] = deque()
        self._submitted = self._done = 0
        """Works, counted by the computing thread and by this one."""
        self._look: Look | None = None
        self._dropped: Foreseen | None = None
        self.cpu_s = 0.0
        self.timeline: Timeline | None = None
        self.submit(_nothing)  # it is there from now on, and may be given a place to run

    @property
    def name(self) -> str:
        return f"{self._forecast.name}, on a thread of its own"

    def saw(self, layer: int, own_E: Ints) -> None:
        self.submit(partial(self._forecast.saw, layer, own_E))

    def look(self, spoken: Spoken, *, is_wanted: bool) -> Ints:
        """Raises what has broken an earlier one."""
        if is_wanted:
            self._look = look = Look(spoken)
            self.submit(partial(self._take, spoken.news, spoken.own_E, look))
        else:
            self.saw(spoken.news.layer, spoken.own_E)
        return np.zeros_like(spoken.own_E)

    def rows_leave(self, news: StepNews) -> None:
        """The thread hears what it needs by itself."""

    def end(self) -> Foreseen:
        look, self._look = self._look, None
        dropped, self._dropped = self._dropped, None
        if look is None:
            return dropped or Foreseen()
        return look.end()

    def drop(self) -> None:
        look, self._look = self._look, None
        if look is not None:
            self._dropped = Foreseen(guess_E=look.end(is_late=False).guess_E)

    def change(self, change: PlannerChange) -> None:
        self.submit(partial(change, self._planning.planner))

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """On the computing thread: something to do behind what was submitted before. Raises what has broken an earlier one."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()
        self._submitted += 1
        self._under_way.append(future := self._courier.submit(partial(self._do, work)))
        return future

    def close(self) -> None:
        """Ends the thread behind looks that the other ranks have handed over, too. Safe to call twice."""
        for look in wait(self._under_way, timeout=CLOSE_S).done:
            if not look.cancelled() and look.exception() is not None:
                logger.warning("looking ahead has failed: %s", look.exception())
        self._courier.close()
        self._rows.close()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self._rows.close()  # nobody takes the row of a later look for this one's
            raise
        self._done += 1
        while self._learn is not None and self._done == self._submitted:
            began_ns = perf_counter_ns()
            if not self._learn():
                break
            self._show(("learn", began_ns, perf_counter_ns()))
        self.cpu_s = time.thread_time()

    def _take(self, news_here: RankNews, own_E: Ints, look: Look) -> None:
        began_ns = perf_counter_ns()
        planning, layer, spoken = self._planning, news_here.layer, look.spoken
        own, guess_E = replace(news_here, late=spoken is None), np.zeros_like(own_E)
        self._forecast.saw(layer, own_E)
        if spoken is not None:
            look.guess_E = guess_E = spoken.predicted_E(self._forecast, planning.following(layer))
        asked_ns = perf_counter_ns()
        row_N = told(own, own_E, guess_E, (0,) * planning.num_ranks)
        news = StepNews.heard(self._rows.tell_all(row_N))
        heard_ns = perf_counter_ns()
        if not news.of("late").any():
            plan, promised = planning.plan(news)
            look.done(partial(planning.begin, plan, promised, news))
        parts = (("predict", began_ns, asked_ns), ("tell", asked_ns, heard_ns), ("plan", heard_ns, perf_counter_ns()))
        self._show(*parts, layer=layer)

    def _show(self, *parts: tuple[str, int, int], **detail: int) -> None:
        timeline = self.timeline  # the computing thread may take it away
        if timeline is not None:
            timeline.spans.extend(Span(AHEAD, name, begin_ns, end_ns, detail) for name, begin_ns, end_ns in parts)


def _nothing() -> None:
    """The thread begins with that."""
