"""Ranks that would plan differently notice it, and all of them decide the same: over a real store, a thread for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from poise.integrations.vllm.agreement import difference, fingerprint
from poise.integrations.vllm.settings import settings_from

ENVIRONMENT = {"POISE_MACHINE": "one-slow", "POISE_SHAPE": "2048x768:bfloat16"}


def verdicts(prints: Sequence[str]) -> list[str | None]:
    store = HashStore()
    with ThreadPoolExecutor(len(prints)) as pool:
        calls = [
            pool.submit(difference, own, store, rank=rank, num_ranks=len(prints), wait_s=10.0)
            for rank, own in enumerate(prints)
        ]
        return [call.result() for call in calls]


def test_ranks_with_the_same_settings_plan() -> None:
    assert verdicts([fingerprint(settings_from(ENVIRONMENT))] * 4) == [None] * 4


def test_one_rank_that_differs_keeps_all_from_planning() -> None:
    same = fingerprint(settings_from(ENVIRONMENT))
    other = fingerprint(settings_from({**ENVIRONMENT, "POISE_MACHINE": "spread-7"}))
    found = verdicts([same, same, other, same])
    assert found[0] is not None
    assert set(found) == {found[0]}
    assert "differs from rank" in found[0]


def test_a_rank_that_does_not_come_keeps_all_from_planning_also_if_it_comes_late() -> None:
    store = HashStore()
    early = difference("a", store, rank=0, num_ranks=2, wait_s=0.2)
    late = difference("a", store, rank=1, num_ranks=2, wait_s=0.2)
    assert early == late == "rank 0 waited 0.2 s for the others"


@pytest.mark.parametrize(
    "change",
    [
        {"POISE_MACHINE": "h200"},
        {"POISE_SHAPE": "4096x1536:bfloat16"},
        {"POISE_MAX_MOVES": "7"},
        {"POISE_WINDOW_STEPS": "7"},
        {"POISE_MACHINE": ""},
    ],
)
def test_whatever_a_plan_depends_on_is_in_the_fingerprint(change: dict[str, str]) -> None:
    assert fingerprint(settings_from({**ENVIRONMENT, **change})) != fingerprint(settings_from(ENVIRONMENT))
    assert fingerprint(settings_from(dict(ENVIRONMENT))) == fingerprint(settings_from(ENVIRONMENT))
