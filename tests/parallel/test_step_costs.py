"""Ranks learn what experts cost from the steps themselves, and all know the very same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.cost.curves import ClosedFormCurve
from poise.cost.experts import ExpertCurve
from poise.parallel.group import RankGroup
from poise.parallel.launch import Launch
from poise.parallel.step_costs import KEPT, StepCosts
from poise.parallel.step_news import RankNews, StepNews, told
from poise.parallel.watch import Patience
from poise.plan.rank_costs import RankCosts
from tests.ranks import start_ranks

PATIENT = Patience(start_s=60, behind_s=60)
EXPERT_S, TOKEN_S = 300e-6, 40e-6
PASSES, SLOWER_FROM = 41, 12
RESTS = range(17, 25)
"""Passes that are not balanced, in which ranks tell each other nothing."""
LAYERS = 4
GRID = np.array([2.0, 7.0, 50.0, 400.0])
"""Tokens, over two experts."""
MEASURED = RankCosts.of_curves([ExpertCurve({1: ClosedFormCurve(EXPERT_S, TOKEN_S, 1.0)})] * 2, np.array([3.0, 3.0]))
"""When nothing else ran on the machine: three times as fast."""


def layer_news(rng: np.random.Generator, slowness_R: np.ndarray) -> StepNews:
    """What ranks tell of a layer that they computed at their pace."""
    active_R = rng.integers(1, 6, 2)
    pairs_R = active_R + rng.integers(0, 60, 2)
    micros_R = 1e6 * slowness_R * (active_R * EXPERT_S + pairs_R * TOKEN_S)
    nothing_E = np.zeros(4, dtype=np.int64)
    rows = [
        told(
            RankNews(layer=0, pairs=int(pairs), active=int(active), compute_us=round(micros)),
            nothing_E,
            nothing_E,
            [0, 0],
        )
        for pairs, active, micros in zip(pairs_R, active_R, micros_R, strict=True)
    ]
    return StepNews.heard(np.stack(rows))


def seconds(costs: RankCosts | None) -> np.ndarray | None:
    """Of each rank (column) for ``GRID``."""
    return None if costs is None else costs.seconds_LR(np.tile(GRID[:, None], (1, 2)), np.full((len(GRID), 2), 2.0))


def learn(launch: Launch, curves: RankCosts | None) -> dict[str, Any]:
    """Rank 1 takes twice as long as rank 0, and from pass ``SLOWER_FROM`` on four times."""
    rng = np.random.default_rng(0)
    was_new, known = [], []
    with RankGroup(launch, {}, patience=PATIENT) as group:
        idle = StepCosts(group, curves)
        idle_new = [idle.begin_pass() for _ in range(3)]
        costs = StepCosts(group, curves)
        for number in range(PASSES):
            was_new.append(costs.begin_pass())
            known.append(seconds(costs.costs))
            for _ in range(LAYERS if number not in RESTS else 0):
                costs.saw(layer_news(rng, np.array([1.0, 2.0 if number < SLOWER_FROM else 4.0])))
    return {"was_new": was_new, "known": known, "idle_new": idle_new, "idle": seconds(idle.costs)}


@pytest.mark.parametrize("curves", [None, MEASURED])
def test_costs_follow_what_ranks_took(curves: RankCosts | None, tmp_path: Path) -> None:
    first, second = start_ranks(learn, 2, tmp_path, curves).results(within_s=60)
    assert first["was_new"] == second["was_new"]
    assert [number for number, new in enumerate(first["was_new"]) if new] == [1, 2, 4, 8, 16, 32, 40], "not in the rest"
    for own, other in zip(first["known"], second["known"], strict=True):
        np.testing.assert_array_equal(own, other, "to the last bit")
    before, after = first["known"][8], first["known"][40]
    np.testing.assert_array_equal(first["known"][0], seconds(curves), "until something is seen")
    truth_G = 2 * EXPERT_S + GRID * TOKEN_S
    np.testing.assert_allclose(before, truth_G[:, None] * [1.0, 2.0], rtol=0.02)
    assert PASSES - len(RESTS) - 1 - KEPT > SLOWER_FROM, "what counts then is all of the slower time"
    np.testing.assert_allclose(after, truth_G[:, None] * [1.0, 4.0], rtol=0.02)


@pytest.mark.parametrize("curves", [None, MEASURED])
def test_while_nobody_has_computed_anything_costs_stay_as_they_are(curves: RankCosts | None, tmp_path: Path) -> None:
    for result in start_ranks(learn, 2, tmp_path, curves).results(within_s=60):
        assert result["idle_new"] == [False] * 3
        np.testing.assert_array_equal(result["idle"], seconds(curves))
