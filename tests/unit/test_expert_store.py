"""The expert store over real files: what it hands out is what lies on disk, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.errors import ReadError
from poise.model.layout import Weights
from poise.offload.expert_store import ExpertStore
from poise.plan.schedule import Policy, ReadAhead
from tests.conftest import MakeCheckpoint, Reference, open_layout, open_store

LAYERS, EXPERTS = 2, 8
ALL = range(EXPERTS)
OpenStore = Callable[..., ExpertStore]


@pytest.fixture
def open_on() -> Iterator[OpenStore]:
    """``open_on(path, slots=3)``: a store over a checkpoint, closed after the test."""
    opened: list[ExpertStore] = []

    def build(path: Path, *, slots: int, dtype: str = "auto", threads: int = 2) -> ExpertStore:
        model, layout, _ = open_layout(path, dtype)
        opened.append(open_store(model, layout, slots=slots, threads=threads))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def path(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("qwen3_moe")


def is_right(model: Any, layer: int, expert: int, weights: Weights) -> bool:
    """Whether an expert's weights are those of the plain model, bit for bit."""
    experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    return all(
        torch.equal(torch.cat(parts), getattr(experts, name)[expert]) for name, parts in weights.items()
    ) and set(weights) == {"gate_up_proj", "down_proj"}


def use(store: ExpertStore, model: Any, layer: int, experts: Sequence[int]) -> list[int]:
    """Asks a layer for experts and takes them all; returns the order they came in. All must be right."""
    store.request(layer, experts)
    order = []
    for _ in experts:
        expert, weights = store.take()
        assert is_right(model, layer, expert, weights)
        store.release(expert)
        order.append(expert)
    assert sorted(order) == sorted(experts)
    return order


def take_everything(store: ExpertStore) -> None:
    """A pass that uses all experts and looks at none: the disk is slower than this."""
    for layer in range(LAYERS):
        store.request(layer, ALL)
        for _ in ALL:
            expert, _ = store.take()
            store.release(expert)


def wait_until(condition: Callable[[], bool]) -> None:
    """Gives the reader threads time; fails after ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the reader threads did not get there"
        time.sleep(0.001)


@pytest.mark.parametrize("slots", [1, 2, 5, 16])
def test_every_expert_is_what_lies_on_disk_through_any_number_of_slots(
    slots: int, path: Path, reference: Reference, open_on: OpenStore
) -> None:
    store, model = open_on(path, slots=slots), reference(path)
    for _ in range(3):
        for layer in range(LAYERS):
            use(store, model, layer, ALL)


def test_residents_come_first_and_then_in_order_of_request_with_one_thread(
    path: Path, reference: Reference, open_on: OpenStore
) -> None:
    store, model = open_on(path, slots=8, threads=1), reference(path)
    use(store, model, 0, [6, 3])
    use(store, model, 1, [0])
    hits, misses = store.counters.hits, store.counters.misses
    order = use(store, model, 0, [1, 3, 5, 6, 7])
    assert set(order[:2]) == {3, 6}
    assert order[2:] == [1, 5, 7]
    assert (store.counters.hits - hits, store.counters.misses - misses) == (2, 3)


def test_what_several_batches_ask_for_is_read_once(path: Path, reference: Reference, open_on: OpenStore) -> None:
    store, model = open_on(path, slots=16), reference(path)
    store.request(0, [1, 2])
    store.request(0, [2, 3])
    assert sorted(use(store, model, 0, [1, 2, 3])) == [1, 2, 3]
    assert store.counters.reads - store.counters.prefetched == store.counters.misses == 3


@pytest.mark.parametrize("read_ahead", ["none", "likely", "foreseen"])
@pytest.mark.parametrize("slots", [9, 12])
def test_passes_that_use_every_expert_hit_all_slots_but_those_being_filled(
    slots: int, read_ahead: ReadAhead, path: Path, open_on: OpenStore
) -> None:
    """Least recently used would never hit. One thread has two reads under way.

    Nothing is computed: a disk that is faster than compute reads before experts have computed that would leave for it, and
    takes the slots of the next layer's instead. That costs hits (4 to 7 of 9) and no time, as the disk has it to spare.
    """
    store = open_on(path, slots=slots, threads=1)
    store.policy = Policy(read_ahead=read_ahead)
    hits = []
    for _ in range(25):
        before = store.counters.hits
        take_everything(store)
        hits.append(store.counters.hits - before)
    assert sum(hits[-10:]) >= 10 * (slots - 3)


@pytest.fixture
def own_copy(path: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(path, tmp_path / "copy"))


def test_a_file_that_became_shorter_is_a_read_error_and_the_store_recovers(
    own_copy: Path, path: Path, reference: Reference, open_on: OpenStore
) -> None:
    store, model = open_on(own_copy, slots=3), reference(path)
    file = own_copy / "model.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    with pytest.raises(ReadError, match=r"model\.safetensors became shorter"):
        take_everything(store)
    store.abandon()
    file.write_bytes(content)
    for layer in range(LAYERS):
        use(store, model, layer, ALL)


def test_abandoning_with_reads_under_way_and_experts_in_use(
    path: Path, reference: Reference, open_on: OpenStore
) -> None:
    store, model = open_on(path, slots=3), reference(path)
    for layer in (0, 1, 0, 1):
        store.request(layer, ALL)
        store.abandon()
        use(store, model, layer, [5, 2])
        store.request(layer, ALL)
        store.take()
        store.take()
        store.abandon()
    for layer in range(LAYERS):
        use(store, model, layer, ALL)


def test_shrinking_and_growing_keeps_what_fits_and_every_content_right(
    path: Path, reference: Reference, open_on: OpenStore
) -> None:
    store, model = open_on(path, slots=16), reference(path)
    for slots in (16, 4, 9, 1, 16, 2):
        store.resize(slots)
        assert store.num_slots == slots
        for layer in (0, 1, 0, 1):
            use(store, model, layer, ALL)
    store.resize(16)
    for layer in (0, 1, 0):
        use(store, model, layer, ALL)
    reads = store.counters.reads
    store.resize(16)
    use(store, model, 1, ALL)
    assert store.counters.reads == reads, "resizing to the same size dropped experts"


def test_closing_leaves_no_thread_and_may_be_repeated(path: Path, open_on: OpenStore) -> None:
    before = sum(thread.name.startswith("poise-reader") for thread in threading.enumerate())
    store = open_on(path, slots=2)
    assert sum(thread.name.startswith("poise-reader") for thread in threading.enumerate()) > before
    store.request(0, ALL)
    store.close()
    assert sum(thread.name.startswith("poise-reader") for thread in threading.enumerate()) == before
    store.close()


def test_a_guess_never_takes_the_slot_of_an_expert_that_is_waited_for(
    path: Path, reference: Reference, open_on: OpenStore
) -> None:
    """After some passes every expert is likely, so the store fetches ahead whenever it may; slots are short."""
    store, model = open_on(path, slots=9), reference(path)
    for number in range(12):
        layer = number % LAYERS
        reads = store.counters.reads - store.counters.prefetched
        misses = store.counters.misses
        store.request(layer, ALL)
        wait_until(lambda: store.counters.reads >= store.counters.misses)
        time.sleep(0.005)
        for _ in ALL:
            expert, weights = store.take()
            time.sleep(0.001)
            assert is_right(model, layer, expert, weights), "the slot was given away"
            store.release(expert)
        assert store.counters.reads - store.counters.prefetched - reads <= store.counters.misses - misses, "read twice"
    assert store.counters.prefetched > 0, "the test needs guesses"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_a_bf16_checkpoint_run_in_fp32_holds_the_same_weights(
    architecture: str, checkpoint: MakeCheckpoint, reference: Reference, open_on: OpenStore
) -> None:
    path = checkpoint(architecture, "bfloat16")
    converted, direct = open_on(path, slots=1, dtype="float32"), open_on(path, slots=1)
    for layer in range(LAYERS):
        for store in (converted, direct):
            store.request(layer, [0, 3])
        held: dict[int, dict[str, torch.Tensor]] = {}
        for _ in range(2):
            expert, weights = converted.take()
            held[expert] = {name: torch.cat(parts).clone() for name, parts in weights.items()}
            converted.release(expert)
        for _ in range(2):
            expert, weights = direct.take()
            assert set(weights) == set(held[expert])
            for name, parts in weights.items():
                assert held[expert][name].dtype == torch.float32
                assert torch.equal(held[expert][name], torch.cat(parts).float())
            direct.release(expert)
