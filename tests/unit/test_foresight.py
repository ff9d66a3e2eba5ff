"""What the store does with foresight: the next layer's likely experts are read, and kept; without it nothing changes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from poise.offload.expert_store import ExpertStore
from poise.plan.outlook import Foreseen
from poise.plan.residency import distance_with_foresight_LE, expected_distance_LE
from poise.predict.hits import Hits
from tests.conftest import MakeCheckpoint, open_layout, open_store

EXPERTS = 8


@pytest.fixture
def store(checkpoint: MakeCheckpoint) -> Iterator[ExpertStore]:
    """Two layers of eight experts, in sixteen slots."""
    model, layout, _ = open_layout(checkpoint("qwen3_moe"))
    opened = open_store(model, layout, slots=16, threads=1)
    yield opened
    opened.close()


def likely(*experts: int) -> Foreseen:
    """These experts are likely, and the first of them gets most tokens."""
    chance_E, tokens_E = np.full(EXPERTS, 0.1), np.full(EXPERTS, 0.1)
    chance_E[list(experts)] = 0.9
    tokens_E[list(experts)] = range(len(experts) + 1, 1, -1)
    return Foreseen(chance_E=chance_E, tokens_E=tokens_E)


def take(store: ExpertStore, count: int) -> None:
    for _ in range(count):
        expert, _ = store.take()
        store.release(expert)


def read_ahead(store: ExpertStore, wanted: int) -> int:
    """Waits for so many reads unasked; returns how many there were."""
    end = time.monotonic() + 10
    while store.counters.prefetched < wanted and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.02)
    return store.counters.prefetched


def test_what_is_foreseen_is_read_ahead_and_then_hit(store: ExpertStore) -> None:
    store.request(0, [0, 1])
    store.foresee(1, likely(5, 6))
    take(store, 2)
    assert read_ahead(store, 2) == 2
    store.request(1, [5, 6, 7])
    store.judge(1, np.array([[5, 7]] * 3 + [[6, 7]]))
    take(store, 3)
    assert store.counters.hits == 2
    assert store.counters.ahead == Hits(named=2, used=2, hottest=1.0), "7 was hotter than 6"


def test_a_foresight_that_fails_costs_reads_and_nothing_else(store: ExpertStore) -> None:
    store.request(0, [0])
    store.foresee(1, likely(3))
    take(store, 1)
    assert read_ahead(store, 1) == 1
    store.request(1, [1, 2])
    store.judge(1, np.array([[1, 2]]))
    take(store, 2)
    assert (store.counters.misses, store.counters.reads) == (3, 4)
    assert store.counters.ahead == Hits(named=1, used=0, hottest=0.0)


def test_foresight_ends_with_its_layer_and_with_an_aborted_pass(store: ExpertStore) -> None:
    store.request(0, [0])
    store.foresee(1, likely())
    take(store, 1)
    store.request(1, [2])
    take(store, 1)
    assert read_ahead(store, 0) == 0
    store.foresee(0, likely(4))
    store.abandon()
    reads = store.counters.reads
    store.request(0, [0])
    take(store, 1)
    assert store.counters.reads <= reads + 1


def test_once_more_is_known_the_unused_are_a_circle_away_and_the_foreseen_near() -> None:
    probability_LE = np.array([[0.5, 0.5], [0.5, 0.25], [0.5, 0.5]])
    before_LE = expected_distance_LE(2, probability_LE)
    known_LE = distance_with_foresight_LE(before_LE, 0, [1], 1, np.array([1.0, 0.0]), probability_LE)
    assert known_LE[0].tolist() == [before_LE[0, 0] + 3, before_LE[0, 1]]
    assert known_LE[1].tolist() == [2.0, 2.0 + 3 / 0.25]
    assert known_LE[2].tolist() == before_LE[2].tolist()


def test_foreseeing_the_running_chance_changes_no_distance() -> None:
    probability_LE = np.random.default_rng(0).uniform(0.01, 1, (4, 6))
    before_LE = expected_distance_LE(0, probability_LE)
    known_LE = distance_with_foresight_LE(before_LE, 1, list(range(6)), 2, probability_LE[2], probability_LE)
    assert np.allclose(known_LE, before_LE)
