"""Which replicas a rank fetches into which slots, and which have come to all: as ranks tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from poise.parallel.replica_fetch import Fetched
from poise.parallel.replica_slots import ReplicaSlots
from poise.parallel.step_news import RankNews, StepNews, told
from poise.parallel.step_plan import StepPlan
from tests.conftest import MakeCheckpoint, open_layout

REPLICAS = np.array([[3, 0, 1], [5, 0, 2], [2, 1, 0], [7, 2, 1], [6, 2, 1]])
"""Expert, source, target: one for rank 0, three for rank 1, one for rank 2."""
LAYER = 4


def plan_of(rank: int, replica_N3: np.ndarray = REPLICAS, *, layer: int = LAYER) -> StepPlan:
    return StepPlan(layer=layer, rank=rank, half=0, replica_N3=replica_N3, pays=True)


def news(digests: Sequence[int], arrived: Sequence[int]) -> StepNews:
    nothing_E = np.zeros(8, dtype=np.int64)
    each_R = [RankNews(layer=LAYER, plan=digest, arrived=bits) for digest, bits in zip(digests, arrived, strict=True)]
    return StepNews.heard(np.stack([told(each, nothing_E, nothing_E, [0] * len(each_R)) for each in each_R]))


def bits(*arrived: bool) -> int:
    return plan_of(0).arrived_bits(Fetched(arrived=arrived, nbytes=0, busy_s=0.0))


@pytest.mark.parametrize(
    ("arrived", "came"),
    [
        ([bits(True), bits(True, True, True), bits(True)], [0, 1, 2, 3, 4]),
        ([bits(False), bits(False, False, False), bits(False)], []),
        ([bits(False), bits(False, True, False), bits(True)], [1, 3]),
        ([bits(True), bits(True, False, True), bits(False)], [0, 2, 4]),
        ([bits(True, True), bits(), bits()], [2]),
    ],
)
def test_what_came_is_what_each_target_tells(arrived: list[int], came: list[int]) -> None:
    heard = news([plan_of(0).digest] * 3, arrived)
    for rank in range(3):
        np.testing.assert_array_equal(plan_of(rank).came(heard), REPLICAS[came])


@pytest.mark.parametrize(
    "other",
    [
        0,
        plan_of(0, REPLICAS[:4]).digest,
        plan_of(0, REPLICAS[::-1].copy()).digest,
        plan_of(0, layer=LAYER + 1).digest,
    ],
)
def test_nothing_came_where_a_rank_has_another_plan(other: int) -> None:
    own = plan_of(0).digest
    for odd in range(3):
        digests = [other if rank == odd else own for rank in range(3)]
        assert plan_of(0).came(news(digests, [7, 7, 7])).shape == (0, 3)


def test_a_plan_without_replicas_is_no_missing_plan() -> None:
    empty = plan_of(1, REPLICAS[:0])
    assert empty.digest != 0
    assert empty.came(news([empty.digest] * 3, [0, 0, 0])).shape == (0, 3)


def test_a_replica_is_computed_from_the_slot_it_was_fetched_into(checkpoint: MakeCheckpoint) -> None:
    """Also where one that was to come before it did not."""
    _, layout, _ = open_layout(checkpoint("qwen3_moe"))
    slots = ReplicaSlots(layout.experts_LE, replica_slots=3)
    plan = replace(plan_of(1), layer=1)
    other = replace(plan, half=1)
    for each, first in ((plan, 10), (other, 20)):
        for place, wanted in enumerate(each.wanted(slots)):
            assert (wanted.expert, wanted.source) == [(3, 0), (7, 2), (6, 2)][place]
            wanted.run[:] = bytes([first + place]) * len(wanted.run)
    heard = news([plan.digest] * 3, [bits(True), bits(False, True, True), bits(True)])
    for each, first in ((plan, 10), (other, 20)):
        places: Mapping[int, int] = each.places(each.came(heard))
        assert places == {7: 1, 6: 2}
        for expert, place in places.items():
            run = slots.run(each.half, place, layer=1, expert=expert)
            assert run.unique().tolist() == [first + place]


@pytest.mark.parametrize(("rank", "share"), [(0, 1.0), (1, 1.0), (2, 0.5), (3, 1.0)])
def test_what_comes_shares_the_link_of_its_source(rank: int, share: float) -> None:
    """Rank 0 gives one to rank 1 as well, to which three come anyway; nothing comes to rank 3."""
    assert plan_of(rank).link_share == share
