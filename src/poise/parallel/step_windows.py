"""How long this rank's link is free for the replicas of each layer, and how fast they come: what the planner must keep to."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
import numpy.typing as npt

from poise.parallel.replica_fetch import Fetched
from poise.parallel.step_news import StepNews

KEEP = 0.7
"""Of what was known of the rate, when a further fetch has ended."""
DOUBT = 0.97
"""Times what a fetch took, for each layer without one."""
USED_FRAC = 0.9
"""Of a window that is planned with."""
LEAST_BYTES_PER_S = 1e3
"""What a rank tells, however little came: doubt raises a rate in proportion, and would never raise none."""


class Windows:
    """Of one rank; the times of all ranks come with ``StepNews``. ``link_bytes_per_s_R``: as tried out at the start.
    ``chunk_bytes``: of a replica that come at a time. ``clock``: seconds."""

    def __init__(
        self,
        num_layers: int,
        link_bytes_per_s_R: npt.NDArray[np.float64],
        *,
        chunk_bytes: int,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._link_R: list[float] = link_bytes_per_s_R.tolist()
        self._fastest, self._clock = max(self._link_R), clock
        self._chunk_bytes = chunk_bytes
        self._last_two_L = [[0.0, 0.0] for _ in range(num_layers)]
        self._pairs_L = [0] * num_layers
        self._opened_s: float | None = None
        self._open_s = 0.0
        self._bytes = self._busy_s = 0.0

    def open(self) -> None:
        """Tokens have come."""
        self._opened_s = self._clock()

    def close(self) -> None:
        """Tokens are about to go."""
        if self._opened_s is not None:
            self._open_s += self._clock() - self._opened_s
        self._opened_s = None

    def end(self, layer: int) -> None:
        """Closes, and what was open since the last time was this layer's window."""
        self.close()
        self._last_two_L[layer] = [self._last_two_L[layer][1], self._open_s]
        self._open_s = 0.0

    def window_us(self, layer: int) -> int:
        """The mean of the last two, but at most twice the shorter one: the time between two calls may be in the other."""
        least, most = sorted(self._last_two_L[layer])
        return round(1e6 * min(2.0 * least, (least + most) / 2.0))

    def fetched(self, fetched: Fetched, link_share: float = 1.0) -> None:
        """A fetch has ended. What is known of the rate is believed less where nothing was fetched: a rate that was once too low
        for any replica would else never be seen to have risen. No link is faster than the fastest. Where not one chunk came
        whole, half of one is taken to have been on its way, or less, by the known rate: a short window makes no link slow. What
        had but a share of the link says of the whole link that much more: the planner counts what each source gives itself. The
        first fetch, which often is far slower than those to come, is believed as much as that the link is free."""
        if fetched.busy_s > 0:
            if not self._busy_s:
                self._busy_s, self._bytes = fetched.busy_s, self._fastest * fetched.busy_s
            rate = self._bytes / self._busy_s
            nbytes = fetched.nbytes / link_share or min(self._chunk_bytes / 2, rate * fetched.busy_s)
            nbytes = min(nbytes, self._fastest * fetched.busy_s)
            self._busy_s = KEEP * self._busy_s + fetched.busy_s
            self._bytes = max(KEEP * self._bytes + nbytes, LEAST_BYTES_PER_S * self._busy_s)
        else:
            self._busy_s = max(DOUBT * self._busy_s, self._bytes / self._fastest)

    @property
    def fetch_kb_s(self) -> int:
        """0: not known. At least 1 where something was to be fetched."""
        return max(1, round(self._bytes / self._busy_s / 1e3)) if self._busy_s > 0 else 0

    def window_s_R(self, news: StepNews, layer: int) -> npt.NDArray[np.float64]:
        """What was told of the windows of the layer behind ``layer``, as seconds at the rate that the planner knows.

        A pass with fewer tokens has shorter windows.
        """
        pairs, before = news.pairs, self._pairs_L[layer]
        self._pairs_L[layer] = pairs
        scale = min(1.0, pairs / before) if before else 0.0
        told = zip(news.of("window_us").tolist(), self.rate_R(news), self._link_R, strict=True)
        return np.array([USED_FRAC * scale * 1e-6 * window_us * rate / link for window_us, rate, link in told])

    def rate_R(self, news: StepNews) -> list[float]:
        """Bytes a second at which each rank's replicas come. A rank that has fetched nothing is taken to be like the others."""
        told_R = [1e3 * kb_s for kb_s in news.of("fetch_kb_s").tolist()]
        known = [rate for rate in told_R if rate > 0]
        usual = sum(known) / len(known) if known else np.inf
        return [min(rate or usual, link) for rate, link in zip(told_R, self._link_R, strict=True)]
