"""Figures of ranks: imbalance is most over mean, waiting what a rank measures beyond the one that waits for nobody."""

from __future__ import annotations

import json

import numpy as np
import pytest

from poise.report.rank_figures import MOST_RANKS, RankFigures, figures_of


def values(ranks: int, passes: int, layers: int, **given: object) -> dict[str, np.ndarray]:
    names = ("routed_tokens", "compute_s", "waited_s", "dispatch_s", "combine_s", "total_s", "sent_bytes")
    return {name: np.zeros((ranks, passes, layers)) + given.get(name, 0.0) for name in names}  # type: ignore[operator]


def two_ranks() -> RankFigures:
    """In both passes and layers rank 1 has three times the tokens and the time, and rank 0 waits for it."""
    by_rank = np.array([1.0, 3.0])[:, None, None]
    layer = values(
        2,
        2,
        2,
        routed_tokens=10 * by_rank,
        compute_s=by_rank,
        waited_s=0.1,
        dispatch_s=0.2,
        combine_s=np.array([2.5, 0.5])[:, None, None],
        total_s=4.0,
        sent_bytes=100.0,
    )
    return figures_of(layer, np.full((2, 2), 9.0), np.array([[0.3, 0.3], [0.1, 0.1]]))


def test_imbalance_and_waiting() -> None:
    figures = two_ranks()
    assert figures.imbalance_L == pytest.approx([1.5, 1.5])
    assert figures.time_imbalance_P == pytest.approx([1.5, 1.5])
    assert figures.slowest_s_P == pytest.approx([6.0, 6.0])
    assert figures.slowest_s_L == pytest.approx([3.0, 3.0])
    assert figures.expert_s_R == pytest.approx([4.0, 12.0])
    assert figures.waited_s_R == pytest.approx([4 * 2.0 + 2 * 0.2, 0.0])
    assert figures.exchange_s_R == pytest.approx([4 * 0.8, 4 * 0.8])
    assert figures.rest_s_R == pytest.approx([2.0, 2.0])
    assert figures.sent_bytes_R == pytest.approx([400.0, 400.0])
    assert figures.waited_s_P == pytest.approx([2 * 2.0 + 0.2] * 2), "two layers, and the agreement"
    assert figures.waited_s_L == pytest.approx([2.0, 2.0]), "the agreement is no layer's"
    assert figures.sent_bytes_L == pytest.approx([200.0, 200.0])
    assert figures.expert_s_RP == pytest.approx(np.array([[2.0, 2.0], [6.0, 6.0]]))
    assert figures.waited_s_RP == pytest.approx(np.array([[4.2, 4.2], [0.0, 0.0]]))


def test_a_layer_without_tokens_is_even() -> None:
    figures = figures_of(values(3, 1, 2), np.ones((3, 1)), np.zeros((3, 1)))
    assert figures.imbalance_P == pytest.approx([1.0])


def test_passes_one_after_the_other_are_joined_by_their_number() -> None:
    one = two_ranks()
    even = figures_of(
        values(2, 6, 2, routed_tokens=5.0, compute_s=1.0, total_s=1.0), np.full((2, 6), 9.0), np.zeros((2, 6))
    )
    both = RankFigures.joined([one, even])
    assert both.passes == 8
    assert both.imbalance_L == pytest.approx([(2 * 1.5 + 6 * 1.0) / 8] * 2)
    assert both.expert_s_R == pytest.approx([16.0, 24.0])
    facts = json.loads(json.dumps(both.to_json()))
    assert facts["steps"]["imbalance"] == pytest.approx([1.5] * 2 + [1.0] * 6)
    assert facts["imbalance"]["max"] == pytest.approx(1.5)
    assert len(facts["ranks"]["waited_s"]) == 2
    assert facts["layers"]["sent_bytes"] == pytest.approx([2 * 200.0 / 8] * 2)
    assert facts["ranks_steps"]["expert_s"] == [[2.0] * 8, [6.0] * 2 + [2.0] * 6]
    assert facts["steps"]["waited_s"] == pytest.approx(np.sum(facts["ranks_steps"]["waited_s"], axis=0))


def test_a_summary_lists_few_ranks_and_those_that_are_waited_for() -> None:
    lines = two_ranks().lines()
    assert "tokens 1.50" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["rank 0", "rank 1"]
    ranks = 3 * MOST_RANKS
    late = np.where(np.arange(ranks) % 3 == 1, 0.0, 1.0)[:, None, None]
    many = figures_of(values(ranks, 1, 1, combine_s=late), np.ones((ranks, 1)), np.zeros((ranks, 1))).lines()
    assert [line.split(":")[0] for line in many[1:-1]] == [f"rank {rank}" for rank in range(1, ranks, 3)]
    assert many[-1].startswith(f"{2 * MOST_RANKS} more ranks")
