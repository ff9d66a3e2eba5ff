"""Whether all ranks have a core to spare: of those that they share, and of those that a control group lets them have."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
import torch

from poise.engine.own_cores import own_cores
from poise.plan.spare_cores import RankCores, can_look_aside, spare_cores_R


def rank(cores: range, quotas: Mapping[str, float] | None = None, *, host: str = "a", threads: int = 1) -> RankCores:
    return RankCores(host=host, cores=tuple(cores), quotas=quotas or {}, threads=threads)


@pytest.mark.parametrize(
    ("ranks", "spare_R", "is_aside"),
    [
        ([rank(range(16))] * 8, [1.0] * 8, True),
        ([rank(range(2 * each, 2 * each + 2)) for each in range(8)], [1.0] * 8, True),
        ([rank(range(each, each + 1)) for each in range(2)], [0.0, 0.0], False),
        ([rank(range(6))] * 3, [1.0] * 3, True),
        ([rank(range(16), threads=4)] * 4, [0.0] * 4, False),
        ([rank(range(2), host="a"), rank(range(2), host="b")], [1.0, 1.0], True),
        ([rank(range(4)), rank(range(4), threads=2)], [1.0, 0.0], False),
        ([rank(range(8), {f"group {each}": 0.5}) for each in range(2)], [-0.5, -0.5], False),
        ([rank(range(8), {"pod": 4.0}), rank(range(8), {"pod": 4.0})], [1.0, 1.0], True),
        ([rank(range(8), {"pod": 3.0}), rank(range(8), {"pod": 3.0})], [0.5, 0.5], False),
        ([rank(range(8), {"pod": 2.0}), rank(range(8), {"pod": 2.0}, host="b")], [1.0, 1.0], True),
    ],
    ids=[
        "sixteen cores for eight ranks",
        "two of their own each",
        "one of their own each",
        "six for three",
        "all cores compute",
        "two hosts",
        "one rank computes with more threads",
        "a share of half a core each",
        "a group for all of them",
        "which is too small",
        "groups of like names on two hosts",
    ],
)
def test_cores_beside_those_that_compute(ranks: list[RankCores], spare_R: list[float], is_aside: bool) -> None:
    assert spare_cores_R(ranks) == pytest.approx(spare_R)
    assert can_look_aside(ranks) is is_aside


def test_this_process_says_what_it_may_use() -> None:
    own = own_cores(torch.device("cpu"))
    assert own.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert own.threads == torch.get_num_threads()
    assert all(cores > 0 for cores in own.quotas.values())
    assert own.host
    assert own_cores(torch.device("cuda")).threads == 1
