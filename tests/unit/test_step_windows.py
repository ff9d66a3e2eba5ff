"""How long links are free for replicas and how fast these come, as the planner is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poise.parallel.replica_fetch import Fetched
from poise.parallel.step_news import RankNews, StepNews, told
from poise.parallel.step_planner import Links, StepPlanner
from poise.parallel.step_windows import DOUBT, KEEP, USED_FRAC, Windows
from tests.balance_cases import EXPERT_BYTES, LINK, TOKEN_BYTES, costs_of

LAYERS, RANKS, EXPERTS = 3, 2, 8
ONES_R = np.ones(RANKS)
CHUNK_BYTES = round(EXPERT_BYTES) // 16
NOTHING = Fetched(arrived=(), nbytes=0, busy_s=0.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def windows(link: float = LINK) -> tuple[Windows, Clock]:
    clock = Clock()
    return Windows(LAYERS, link * ONES_R, chunk_bytes=CHUNK_BYTES, clock=clock), clock


def stay_open(made: Windows, clock: Clock, *parts_s: float, layer: int) -> None:
    """Open for each of the parts, closed for a second between them and behind the last one."""
    for part_s in parts_s:
        made.open()
        clock.now_s += part_s
        made.close()
        clock.now_s += 1.0
    made.end(layer)


def fetched(nbytes: float, busy_s: float) -> Fetched:
    return Fetched(arrived=(True,), nbytes=round(nbytes), busy_s=busy_s)


def news(window_us: int = 0, rates_kb_s: tuple[int, ...] = (0,) * RANKS, pairs: int = 80, **more: Any) -> StepNews:
    own_E = np.full(EXPERTS, pairs // RANKS // EXPERTS)
    own = [RankNews(layer=0, window_us=window_us, fetch_kb_s=rate, **more) for rate in rates_kb_s]
    return StepNews.heard(np.stack([told(each, own_E, own_E, [0] * RANKS) for each in own]))


def test_a_window_is_the_time_in_which_the_link_was_free() -> None:
    made, clock = windows()
    for _ in range(2):
        stay_open(made, clock, 0.002, 0.003, layer=1)
    assert made.window_us(1) == 5000
    assert made.window_us(0) == made.window_us(2) == 0


@pytest.mark.parametrize(
    ("last_s", "expected_us"),
    [((0.004, 0.006), 5000), ((0.006, 0.004), 5000), ((0.002, 0.1), 4000), ((0.1, 0.002), 4000)],
)
def test_it_is_the_mean_of_the_last_two_but_at_most_twice_the_shorter(
    last_s: tuple[float, float], expected_us: int
) -> None:
    made, clock = windows()
    for seconds in (0.5, *last_s):
        stay_open(made, clock, seconds, layer=2)
    assert made.window_us(2) == expected_us


def test_one_window_alone_is_not_believed() -> None:
    made, clock = windows()
    stay_open(made, clock, 0.004, layer=0)
    assert made.window_us(0) == 0


def test_a_pass_with_fewer_tokens_has_shorter_windows_and_one_with_more_has_no_longer_ones() -> None:
    made, _ = windows()
    first_R = made.window_s_R(news(1000, pairs=160), 0)
    np.testing.assert_array_equal(first_R, 0.0, "nothing is known of windows before the first pass")
    whole_R = made.window_s_R(news(1000, pairs=160), 0)
    np.testing.assert_allclose(whole_R, USED_FRAC * 1e-3)
    np.testing.assert_allclose(made.window_s_R(news(1000, pairs=32), 0), 0.2 * whole_R)
    np.testing.assert_allclose(made.window_s_R(news(1000, pairs=1600), 0), whole_R)
    np.testing.assert_array_equal(made.window_s_R(news(1000, pairs=160), 1), 0.0, "layers apart")


def test_the_planner_gets_a_window_in_seconds_of_its_own_rate() -> None:
    """Replicas that come at a quarter of the link's rate have a quarter of the window."""
    made, _ = windows()
    made.window_s_R(news(1000), 0)
    window_s_R = made.window_s_R(news(1000, (round(LINK / 4e3), round(LINK / 1e3))), 0)
    np.testing.assert_allclose(window_s_R, [USED_FRAC * 0.25e-3, USED_FRAC * 1e-3])


def test_a_rank_that_fetched_nothing_is_taken_to_be_like_the_others() -> None:
    made = Windows(LAYERS, np.array([LINK, LINK, LINK, LINK / 10]), chunk_bytes=CHUNK_BYTES)
    own_E = np.zeros(EXPERTS, dtype=np.int64)
    rates = [0, round(LINK / 2e3), round(LINK / 4e3), 0]
    rows = [told(RankNews(layer=0, fetch_kb_s=rate), own_E, own_E, [0] * 4) for rate in rates]
    rate_R = made.rate_R(StepNews.heard(np.stack(rows)))
    np.testing.assert_allclose(rate_R, [0.375 * LINK, LINK / 2, LINK / 4, LINK / 10], err_msg="at most its link")
    nobody_R = made.rate_R(StepNews.heard(np.stack([rows[0]] * 4)))
    np.testing.assert_array_equal(nobody_R, [LINK, LINK, LINK, LINK / 10])


def test_a_rate_follows_the_last_fetches() -> None:
    made, _ = windows()
    assert made.fetch_kb_s == 0
    made.fetched(NOTHING)
    assert made.fetch_kb_s == 0, "what is not known is not doubted"
    slow, fast = LINK * 0.01 / 4, LINK * 0.01 / 2
    made.fetched(fetched(fast, 0.01))
    expected, busy_s = KEEP * LINK * 0.01 + fast, KEEP * 0.01 + 0.01
    assert made.fetch_kb_s == pytest.approx(expected / busy_s / 1e3, rel=1e-5), "the first is half believed"
    made.fetched(fetched(slow, 0.01))
    expected, busy_s = KEEP * expected + slow, KEEP * busy_s + 0.01
    assert made.fetch_kb_s == pytest.approx(expected / busy_s / 1e3, rel=1e-5)
    before = made.fetch_kb_s
    for _ in range(10):
        made.fetched(NOTHING)
    assert made.fetch_kb_s == pytest.approx(before / DOUBT**10, rel=1e-5)


@pytest.mark.parametrize("nbytes", [EXPERT_BYTES, 0.0])
def test_after_a_slow_fetch_replicas_come_again(nbytes: float) -> None:
    """The link was busy with something else for once: even if not a byte came."""
    made, _ = windows()
    links = Links(bytes_per_s_R=LINK * ONES_R, token_bytes=round(TOKEN_BYTES), expert_bytes=round(EXPERT_BYTES))
    homes_LS = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    planner = StepPlanner(
        homes_LS, links, num_experts=EXPERTS, replica_slots=2, most_work=500, costs=costs_of(ONES_R, p=1.0)
    )
    counts_RE = np.tile([400, 400, 400, 400, 10, 10, 10, 10], (RANKS, 1))
    window_us = round(3e6 * EXPERT_BYTES / LINK)

    def replicas() -> int:
        told_now = news(window_us, (made.fetch_kb_s, 0))
        window_s_R = made.window_s_R(told_now, 0)
        plan = planner.plan(1, counts_RE, window_s_R, ONES_R, ONES_R)
        assert plan is not None
        return len(plan.replica_N3)

    replicas()
    assert replicas() > 0
    slow = 0
    while replicas():
        slow += 1
        made.fetched(fetched(nbytes, 10 * EXPERT_BYTES / LINK))
        assert slow < 6, "slow fetches are never believed"
    assert slow > 1, "the first fetch is not all that is known"
    layers = 0
    while not replicas():
        made.fetched(NOTHING)
        layers += 1
        assert layers < 1000, "no replica ever comes again"
    assert layers > 2, "slow fetches are forgotten at once"


def test_a_window_in_which_no_chunk_came_whole_does_not_make_the_link_slow_for_hundreds_of_layers() -> None:
    """The first fetch of a run often ends so: its window was too short."""
    made, _ = windows()
    for _ in range(100):
        made.fetched(fetched(0.0, 1.0))
    slowest = made.fetch_kb_s
    assert slowest == pytest.approx(CHUNK_BYTES / 2 / 1e3, abs=1)
    made.fetched(fetched(0.0, 1e-6))
    assert made.fetch_kb_s == slowest, "a window of a microsecond says nothing"
    shut, _ = windows()
    shut.fetched(fetched(0.0, 1e-6))
    assert shut.fetch_kb_s == round(LINK / 1e3), "no faster than the link"


def test_doubt_ends_at_the_rate_of_the_link() -> None:
    """However long nothing is fetched: what is told stays a number that can be told."""
    made, _ = windows()
    made.fetched(fetched(EXPERT_BYTES, 1e-3))
    for _ in range(30_000):
        made.fetched(NOTHING)
    assert made.fetch_kb_s == round(LINK / 1e3)
    np.testing.assert_allclose(made.rate_R(news(0, (made.fetch_kb_s, 0))), LINK)


def test_a_fetch_that_shares_its_link_says_nothing_against_the_link() -> None:
    """Two ranks fetch from one: each gets half of what that one can give, and the planner counts what it gives itself."""
    shared, alone = windows()[0], windows()[0]
    for _ in range(3):
        shared.fetched(fetched(EXPERT_BYTES / 2, 0.01), link_share=0.5)
        alone.fetched(fetched(EXPERT_BYTES, 0.01))
    assert shared.fetch_kb_s == alone.fetch_kb_s
    shared.fetched(fetched(LINK, 1.0), link_share=0.5)
    assert shared.fetch_kb_s <= round(LINK / 1e3), "no faster than the link"
