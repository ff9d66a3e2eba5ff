"""Figures of balanced steps from numbers that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from poise.report.step_figures import StepFigures, step_figures_of


def layer_of(**values: list[list[list[float]]]) -> dict[str, np.ndarray]:
    """Two ranks, one pass, two layers; zero unless given."""
    names = ["routed_tokens", "home_pairs", "own_pairs", "guessed_wrong", "replicas_planned", "replicas_used"]
    names += ["replica_bytes", "declined", "late", "counts_s", "balance_s", "aux_s", "rested"]
    names += ["learnt_steps", "learnt_late", "learnt_s"]
    return {name: np.array(values.get(name, np.zeros((2, 1, 2))), dtype=float) for name in names}


def test_imbalance_before_and_after_guesses_and_what_is_exposed() -> None:
    figures = step_figures_of(
        layer_of(
            home_pairs=[[[30, 10]], [[10, 10]]],
            routed_tokens=[[[22, 10]], [[18, 10]]],
            own_pairs=[[[20, 10]], [[20, 10]]],
            guessed_wrong=[[[4, 0]], [[2, 0]]],
            replicas_planned=[[[2, 0]], [[1, 0]]],
            replicas_used=[[[1, 0]], [[1, 0]]],
            replica_bytes=[[[100, 0]], [[60, 0]]],
            declined=[[[0, 1]], [[0, 1]]],
            late=[[[1, 0]], [[0, 0]]],
            balance_s=[[[0.01, 0.01]], [[0.03, 0.01]]],
            counts_s=[[[0.5, 0.02]], [[0.04, 0.3]]],
            aux_s=[[[0.002, 0]], [[0.001, 0]]],
        ),
        np.array([[1.0], [1.2]]),
    )
    assert figures.home_imbalance_P.tolist() == [pytest.approx((1.5 + 1.0) / 2)]
    assert figures.imbalance_P.tolist() == [pytest.approx((1.1 + 1.0) / 2)]
    assert figures.exposed_s_L.tolist() == pytest.approx([0.02 + 0.04, 0.01 + 0.02])
    facts = figures.to_json()
    assert facts["guessed_wrong_frac"] == pytest.approx(6 / 60)
    assert (facts["replicas_planned"], facts["replicas_used"], facts["declined"], facts["late"]) == (3, 2, 1, 1)
    assert facts["exposed_frac"] == pytest.approx(0.09 / 1.2)
    first, guesses, replicas, cost = figures.lines("those who know")
    assert first.endswith("1.25 with experts at home, 1.05 with replicas")
    assert guesses == "predicted by those who know: 90% of the tokens for the experts that they went to"
    assert replicas == "replicas: 2 used, 1 late, 160 B came; in 1 of 2 layers none paid, in 1 the plan came too late"
    assert cost.startswith("cost of it: 7.5% of the passes, and 3")


def test_figures_of_passes_one_after_the_other() -> None:
    one = step_figures_of(layer_of(home_pairs=[[[3, 1]], [[1, 1]]]), np.ones((2, 1)))
    both = StepFigures.joined([one, one, step_figures_of(layer_of(), np.full((2, 1), 2.0))])
    assert both.passes == 3
    assert both.pass_s_P.tolist() == [1, 1, 2]
    assert both.home_imbalance_L.tolist() == pytest.approx([(1.5 + 1.5 + 1) / 3, 1])


def test_passes_in_which_balancing_rested_are_counted() -> None:
    rested = step_figures_of(layer_of(rested=[[[1, 1]], [[1, 1]]]), np.ones((2, 1)))
    both = StepFigures.joined([rested, step_figures_of(layer_of(), np.ones((2, 1)))])
    assert both.to_json()["rested_passes"] == 1
    assert both.lines("nobody")[2].endswith("in 0 of 2 layers none paid")
    assert both.lines("nobody")[3].endswith("; it rested in 2 of 4 layers, where it costs more than it brings")


def test_what_predictors_learn_meanwhile_is_said_beside_what_they_predict() -> None:
    figures = step_figures_of(
        layer_of(
            own_pairs=[[[50, 50]], [[50, 50]]],
            learnt_steps=[[[4, 0]], [[5, 1]]],
            learnt_late=[[[1, 0]], [[0, 0]]],
            learnt_s=[[[0.02, 0]], [[0.05, 0.01]]],
        ),
        np.array([[1.0], [0.9]]),
    )
    facts = figures.to_json()
    assert (facts["learnt_steps"], facts["learnt_late"], facts["learnt_frac"]) == (10, 1, pytest.approx(0.04))
    assert figures.lines("them")[1].endswith(
        "; 10 steps of learning meanwhile, 4.0% of the time, 1 of them longer than the wait"
    )
