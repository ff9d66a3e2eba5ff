"""Replicas come in chunks while both windows are open; what is late is dropped, and nobody waits for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from poise.parallel.replica_fetch import Wanted
from poise.parallel.replica_staging import Landing, Outlet
from poise.parallel.replica_track import ReplicaTrack, Serve
from poise.parallel.replica_wire import Message
from poise.spec.timeline import PREFETCH, Timeline

CHUNK = 1000
EXPERT_BYTES = 10 * CHUNK + 300


@dataclass
class Side:
    """A rank's track, its experts at home by (layer, expert), and the chunks it has been asked for."""

    track: ReplicaTrack
    asked: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def two_sides(*, through_host: bool = False, **options: bool) -> Iterator[tuple[Side, Side]]:
    first, second = socket.socketpair()
    sides: list[Side] = []

    def serve_of(rank: int) -> Serve:
        def run_of(layer: int, expert: int) -> torch.Tensor | None:
            sides[rank].asked.append((layer, expert))
            return None if expert == 99 else torch.frombuffer(content(rank, layer, expert), dtype=torch.uint8)

        cpu = torch.device("cpu")
        return Outlet(run_of, cpu, num_ranks=2, chunk_bytes=CHUNK, through_host=through_host).chunk

    for rank, sock in enumerate((first, second)):
        sides.append(Side(ReplicaTrack({1 - rank: sock}, serve_of(rank), chunk_bytes=CHUNK, **options)))
    try:
        yield sides[0], sides[1]
    finally:
        for side in sides:
            side.track.close()
        assert all(side.track.error is None for side in sides)


def content(rank: int, layer: int, expert: int) -> bytearray:
    return bytearray(np.random.default_rng([rank, layer, expert]).bytes(EXPERT_BYTES))


def wanted(expert: int, source: int = 1) -> Wanted:
    return Wanted(expert=expert, source=source, run=memoryview(bytearray(EXPERT_BYTES)))


class LateLanding(Landing):
    """Its copy ends a while after it was begun, as on a GPU that has other things to do."""

    late_s = 0.1

    def all_here(self) -> None:
        self.begun_s = time.monotonic()
        self._copying = threading.Timer(self.late_s, super().all_here)
        self._copying.start()

    def wait(self) -> None:
        self._copying.join()


class BrokenLanding(Landing):
    """Its copy cannot begin."""

    def all_here(self) -> None:
        raise RuntimeError("there is no such slot")


def landing_at(
    expert: int, kind: type[Landing] = Landing, *, source: int = 1, nbytes: int = EXPERT_BYTES
) -> tuple[Wanted, torch.Tensor]:
    """By way of other memory; the slot that it lands in."""
    host, slot = torch.zeros(2, nbytes, dtype=torch.uint8)
    landing = kind(host, slot, stream=None, behind=None)
    return Wanted(expert=expert, source=source, run=host.numpy().data, landing=landing), slot


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.002)


def test_replicas_arrive_byte_for_byte_in_both_directions_at_once() -> None:
    with two_sides() as (here, there):
        mine, theirs = [wanted(3), wanted(5)], [wanted(7, source=0)]
        here.track.fetch(2, mine)
        there.track.fetch(2, theirs)
        until(lambda: len(here.asked) == 11 and len(there.asked) == 22)
        until(lambda: here.track.waits_since_s is None and there.track.waits_since_s is None)
        fetched, other = here.track.end_fetch(), there.track.end_fetch()
        assert fetched.arrived == (True, True)
        assert other.arrived == (True,)
        assert fetched.nbytes == 2 * EXPERT_BYTES
        assert fetched.busy_s > 0
        assert [bytes(each.run) for each in mine] == [content(1, 2, 3), content(1, 2, 5)]
        assert bytes(theirs[0].run) == content(0, 2, 7)
        until(lambda: here.track.moved_bytes == there.track.moved_bytes == 3 * EXPERT_BYTES)
        assert here.track.cpu_s > 0


def test_replicas_of_gpus_come_by_way_of_host_memory() -> None:
    with two_sides(through_host=True) as (here, there):
        (first, first_slot), (second, second_slot) = landing_at(3), landing_at(5)
        here.track.fetch(2, [first, second])
        until(lambda: len(there.asked) == 22 and here.track.waits_since_s is None)
        assert here.track.end_fetch().arrived == (True, True)
        assert first_slot.numpy().tobytes() == content(1, 2, 3)
        assert second_slot.numpy().tobytes() == content(1, 2, 5)


def test_the_next_replica_comes_while_the_last_is_still_copied_and_none_counts_before_it_is() -> None:
    with two_sides(through_host=True) as (here, there):
        replicas, slots = zip(*(landing_at(expert, LateLanding) for expert in (3, 5, 6)), strict=True)
        here.track.fetch(2, replicas)
        until(lambda: len(there.asked) == 33 and here.track.waits_since_s is None)
        begun_s = [each.landing.begun_s for each in replicas]
        assert begun_s[2] - begun_s[0] < LateLanding.late_s, "it waited for a copy"
        fetched = here.track.end_fetch()
        assert fetched.nbytes == 3 * EXPERT_BYTES
        assert fetched.arrived[2] is False
        for each in replicas:
            each.landing.wait()
        again = [landing_at(expert, LateLanding) for expert in (7, 8)]
        here.track.fetch(3, [replica for replica, _ in again])
        assert here.track.finish(within_s=10.0).arrived == (True, True), "whoever waits, waits for the copies"
        for slot, expert in zip(slots, (3, 5, 6), strict=True):
            assert slot.numpy().tobytes() == content(1, 2, expert)
        for (_, slot), expert in zip(again, (7, 8), strict=True):
            assert slot.numpy().tobytes() == content(1, 3, expert)


def test_replicas_land_in_slots_that_were_made_in_inference_mode() -> None:
    with two_sides() as (here, _):
        with torch.inference_mode():
            replica, slot = landing_at(3)
        here.track.fetch(2, [replica])
        assert here.track.finish(within_s=10.0).arrived == (True,)
        assert slot.numpy().tobytes() == content(1, 2, 3)


def test_what_breaks_the_track_is_heard_at_once_by_who_waits_for_it() -> None:
    with two_sides() as (here, _):
        replica, _ = landing_at(3, BrokenLanding)
        here.track.fetch(2, [replica])
        began_s = time.monotonic()
        with pytest.raises(RuntimeError, match="there is no such slot"):
            here.track.finish(within_s=60.0)
        assert time.monotonic() - began_s < 30.0
        here.track.error = None  # it was heard


def test_what_comes_after_the_end_of_a_fetch_never_lands() -> None:
    """Even where it is all that was missing: here, the only chunk of a small expert."""
    with two_sides() as (here, there):
        late, slot = landing_at(4, nbytes=CHUNK)
        there.track.suspend()
        here.track.fetch(0, [late])
        until(lambda: here.track.waits_since_s is not None)
        assert here.track.end_fetch().arrived == (False,)
        there.track.resume()
        until(lambda: here.track.waits_since_s is None)
        here.track.fetch(1, [wanted(5)])  # begins behind what was on its way
        until(lambda: len(there.asked) == 12 and here.track.waits_since_s is None)
        assert bytes(late.run) == content(1, 0, 4)[:CHUNK], "it did come"
        assert not slot.any()


@pytest.mark.parametrize("who", ["destination", "source"])
def test_nothing_travels_while_either_window_is_closed(who: str) -> None:
    with two_sides() as (here, there):
        side = here if who == "destination" else there
        side.track.suspend()
        here.track.fetch(0, [wanted(3)])
        time.sleep(0.05)
        assert not there.asked
        side.track.resume()
        until(lambda: len(there.asked) == 11)


def test_a_fetch_that_is_suspended_goes_on_where_it_stopped_and_shows_its_parts() -> None:
    with two_sides() as (here, there):
        here.track.timeline = timeline = Timeline()
        expert = wanted(3)
        serve = there.track._serve

        def slowly(asked: Message, rank: int) -> memoryview | None:
            time.sleep(0.004)
            return serve(asked, rank)

        there.track._serve = slowly
        here.track.fetch(4, [expert])
        until(lambda: len(there.asked) >= 3)
        here.track.suspend()
        stopped = len(there.asked)
        time.sleep(0.05)
        assert len(there.asked) <= stopped + 1, "more than the chunk that was on its way"
        here.track.resume()
        until(lambda: len(there.asked) == 11 and here.track.waits_since_s is None)
        assert here.track.end_fetch().arrived == (True,)
        assert bytes(expert.run) == content(1, 4, 3)
    spans = [span for span in timeline.spans if span.track == PREFETCH]
    assert sorted(span.name for span in spans) == ["fetch, part 1", "fetch, part 2", "suspended"]
    first, second, between = sorted(spans, key=lambda span: span.name)
    assert first.end_ns == between.begin_ns
    assert between.end_ns <= second.begin_ns
    assert between.end_ns - between.begin_ns > 40e6
    assert sum(int(span.detail["bytes"]) for span in (first, second)) == EXPERT_BYTES


def test_without_suspension_chunks_go_on() -> None:
    with two_sides(suspends=False) as (here, there):
        here.track.suspend()
        there.track.suspend()
        here.track.fetch(0, [wanted(3)])
        until(lambda: len(there.asked) == 11)


def test_what_is_late_is_dropped_and_the_next_fetch_is_whole() -> None:
    with two_sides() as (here, there):
        late, early = wanted(4), wanted(6)
        there.track.suspend()
        here.track.fetch(0, [late])
        until(lambda: here.track.waits_since_s is not None)
        dropped = here.track.end_fetch()
        assert dropped.arrived == (False,)
        assert dropped.nbytes == 0
        here.track.fetch(1, [early])
        there.track.resume()
        until(lambda: len(there.asked) == 12 and here.track.waits_since_s is None)
        assert here.track.end_fetch().arrived == (True,)
        assert bytes(early.run) == content(1, 1, 6)
        assert here.track.end_fetch().arrived == ()


def test_an_expert_that_has_left_its_home_is_skipped() -> None:
    with two_sides() as (here, there):
        here.track.fetch(0, [wanted(99), wanted(2)])
        until(lambda: len(there.asked) == 12 and here.track.waits_since_s is None)
        assert here.track.end_fetch().arrived == (False, True)


def test_a_rank_that_leaves_does_not_break_the_others() -> None:
    with two_sides() as (here, there):
        there.track.close()
        here.track.fetch(0, [wanted(3)])
        until(lambda: here.track._fetch is None or here.track._fetch.is_over)
        assert here.track.end_fetch().arrived == (False,)
