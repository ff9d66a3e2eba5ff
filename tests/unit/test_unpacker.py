"""Quantised experts on their way through the ring: an error, an abandoned pass, the end of the threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from poise.model.weights import Packed, unpack
from poise.offload import unpacker
from poise.offload.expert_store import ExpertStore
from tests.conftest import MakeCheckpoint, open_layout, open_store
from tests.quantised_checkpoints import write_mxfp4


@pytest.fixture(scope="module")
def path(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4(checkpoint("gpt_oss", "bfloat16"), tmp_path_factory.mktemp("mxfp4") / "model")


@pytest.fixture
def store(path: Path) -> Iterator[ExpertStore]:
    model, layout, _ = open_layout(path)
    store = open_store(model, layout, slots=sum(map(len, layout.experts_LE)))
    yield store
    store.close()


def experts_of(store: ExpertStore) -> range:
    return range(len(store._supplier._sources_LE[0]))


def take_all(store: ExpertStore) -> dict[int, torch.Tensor]:
    """Layer 0, a copy of each expert's down-projection."""
    store.request(0, experts_of(store))
    found = {}
    for _ in experts_of(store):
        expert, weights = store.take()
        found[expert] = weights["down_proj"][0].clone()
        store.release(expert)
    return found


def test_more_experts_than_buffers_pass_through_and_an_expert_in_use_keeps_its_own(store: ExpertStore) -> None:
    want = take_all(store)
    assert len(want) > unpacker.num_threads() + 1
    store.request(1, [0])
    store.take()
    store.release(0)
    store.request(0, experts_of(store))
    expert, weights = store.take()
    for _ in range(unpacker.num_threads()):
        other, _ = store.take()
        store.release(other)
    assert torch.equal(weights["down_proj"][0], want[expert])
    store.abandon()


def test_an_expert_that_cannot_be_unpacked_ends_the_pass_and_the_next_one_works(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = take_all(store)
    store.request(1, [0])
    store.take()
    store.release(0)

    def fail(packed: Packed, *rest: object) -> None:
        raise ValueError(f"expert {packed.source.expert} is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(unpacker, "unpack", fail)
        with pytest.raises(ValueError, match="is damaged"):
            take_all(store)
        store.abandon()
    assert unpacker.unpack is unpack
    found = take_all(store)
    assert all(torch.equal(found[expert], want[expert]) for expert in want)


def test_abandoned_at_any_moment_the_ring_is_whole_again(store: ExpertStore) -> None:
    want = take_all(store)
    for taken in range(5):
        store.request(1 - taken % 2, experts_of(store))
        for _ in range(taken):
            store.take() if taken < unpacker.num_threads() else store.release(store.take()[0])
        store.abandon()
        found = take_all(store)
        assert all(torch.equal(found[expert], want[expert]) for expert in want)


def test_closing_leaves_no_thread(path: Path) -> None:
    model, layout, _ = open_layout(path)
    before = threading.active_count()
    store = open_store(model, layout, slots=2)
    assert threading.active_count() > before
    store.request(0, experts_of(store))
    store.close()
    assert threading.active_count() == before
