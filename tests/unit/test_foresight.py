"""What the store does with foresight: the next layer's likely experts are read, and kept; without it nothing changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import poise
from poise import LLM, SamplingParams
from poise.errors import ReadError
from poise.model.arena import Arena
from poise.offload.expert_store import ExpertStore
from poise.plan.outlook import Foreseen
from poise.plan.residency import distance_with_foresight_LE, expected_distance_LE
from poise.predict.hits import Hits
from poise.spec.timeline import Timeline
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


def test_a_run_says_how_good_its_read_ahead_was_in_prefill_and_in_decode_apart() -> None:
    """The bundled model in a fifth of its experts: whenever a layer's own are there, some of the next are read ahead."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(Path(poise.__file__).parent / "assets" / "tiny-moe", memory="1GiB", expert_slots=40) as llm:
        llm.generate(["def main():", "The cat sat"], params)
        progress = llm.last_progress
        counted = llm.runner.store.counters
    assert progress is not None
    both = progress.prefill_ahead + progress.decode_ahead
    assert (both.named, both.used) == (counted.ahead.named, counted.ahead.used)
    assert both.hottest == pytest.approx(counted.ahead.hottest)
    assert 0 < progress.decode_ahead.hottest <= progress.decode_ahead.used <= progress.decode_ahead.named
    assert 0 < progress.decode_ahead.named <= counted.prefetched


def test_reads_are_in_the_order_of_need(checkpoint: MakeCheckpoint) -> None:
    """Cold experts, dense weights of the next layer, its hot experts, dense weights behind it: whatever was said first."""
    model, layout, _ = open_layout(checkpoint("qwen3_moe"))
    store = open_store(model, layout, slots=16, threads=1)
    store.timeline = timeline = Timeline()
    part, arena, there = layout.experts_LE[0][0].parts[0], Arena(2, 4096), threading.Semaphore(0)

    def read_dense(slot: int, moe_layer: int) -> None:
        read = part.file, 0, 16, arena.view_of(slot, 0, 4096)
        store.read_dense(read, lambda _: there.release(), label=(f"read dense {moe_layer}", {}), moe_layer=moe_layer)

    store._supplier.max_under_way, limit = 0, store._supplier.max_under_way  # no read begins before all is said
    store.request(0, [0, 1])
    read_dense(0, 1)
    read_dense(1, 2)
    store.foresee(1, likely(5))
    store._supplier.max_under_way = limit
    store.request(0, [2, 3, 4])
    for _ in range(2):
        assert there.acquire(timeout=10)
    take(store, 5)
    store.close()
    names = [span.name for span in timeline.spans if span.name.startswith("read")]
    assert names == [*["read"] * 5, "read dense 1", "read ahead", "read dense 2"]


def test_dense_weights_that_wait_when_the_store_closes_end_with_an_error(checkpoint: MakeCheckpoint) -> None:
    model, layout, _ = open_layout(checkpoint("qwen3_moe"))
    store = open_store(model, layout, slots=8, threads=1)
    part, memory, errors = layout.experts_LE[0][0].parts[0], Arena(1, 4096).view_of(0, 0, 4096), []
    store._supplier.max_under_way = 0
    store.read_dense((part.file, 0, 16, memory), errors.append, label=("read dense", {}), moe_layer=1)
    store.close()
    assert [type(error) for error in errors] == [ReadError]


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
