"""The correlation table: it counts what happened, its predictions are expectations, and it forgets and persists as it says."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.errors import TraceError
from poise.predict.correlation import CorrelationTable, Ints, sampled

LAYERS = 3


def routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> list[Ints]:
    """For every layer what ``tokens`` tokens choose; a choice of ``experts`` is masked now and then."""
    chosen = [np.argsort(rng.random((tokens, experts + 1)), axis=1)[:, :top_k] for _ in range(LAYERS)]
    return [np.asarray(each, dtype=np.int64) for each in chosen]


def learn(table: CorrelationTable, passes: list[list[Ints]]) -> CorrelationTable:
    for chosen in passes:
        for layer in range(LAYERS):
            table.observe(layer, chosen[layer], chosen[layer - 1] if layer else None)
    return table


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, list[list[Ints]]]:
    experts = draw(st.integers(2, 8))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    passes = [routing(rng, draw(st.integers(1, 9)), experts, top_k) for _ in range(draw(st.integers(0, 5)))]
    return experts, top_k, passes


def table_of(experts: int, top_k: int, *, forgets: bool = False) -> CorrelationTable:
    return CorrelationTable(num_layers=LAYERS, num_experts=experts, top_k=top_k, forgets=forgets)


@given(case=cases(), tokens=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=80)
def test_votes_are_expectations_and_chances_are_chances(
    case: tuple[int, int, list[list[Ints]]], tokens: int, seed: int
) -> None:
    experts, top_k, passes = case
    table = learn(table_of(experts, top_k), passes)
    before_TK = routing(np.random.default_rng(seed), tokens, experts, top_k)[0]
    for layer in range(LAYERS):
        chances_TE = table.chances_TE(layer, before_TK)
        used_E, votes_E = table.foresee(layer, before_TK)
        assert np.array_equal(votes_E, table.predict(layer, before_TK))
        assert chances_TE.shape == (tokens, experts)
        assert ((chances_TE >= 0) & (chances_TE < 1)).all()
        assert (chances_TE.sum(axis=1) <= top_k + 1e-3).all()
        assert np.allclose(votes_E, chances_TE.sum(axis=0), rtol=1e-4)
        assert ((used_E >= chances_TE.max(axis=0) - 1e-4) & (used_E <= np.minimum(1, votes_E) + 1e-4)).all()
        top = table.top(layer, before_TK, top_k)
        assert len(set(top.tolist())) == top_k
        assert votes_E[top].min() >= np.delete(votes_E, top).max(initial=0)


@given(case=cases())
@settings(max_examples=40)
def test_it_counts_pairs_of_the_same_token(case: tuple[int, int, list[list[Ints]]]) -> None:
    experts, top_k, passes = case
    table = learn(table_of(experts, top_k), passes)
    pairs_LEE = np.zeros((LAYERS, experts, experts))
    for chosen, layer in itertools.product(passes, range(1, LAYERS)):
        for before_K, after_K in zip(chosen[layer - 1], chosen[layer], strict=True):
            for before, after in itertools.product(before_K, after_K):
                if before < experts and after < experts:
                    pairs_LEE[layer, before, after] += 1
    assert np.array_equal(table._pairs_LEE, pairs_LEE)


@given(case=cases())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_table_predicts_the_same(case: tuple[int, int, list[list[Ints]]], tmp_path: Path) -> None:
    experts, top_k, passes = case
    table = learn(table_of(experts, top_k), passes)
    table.save(tmp_path / "table.safetensors", model="abc")
    read = CorrelationTable.load(tmp_path / "table.safetensors", model="abc")
    fresh = learn(table_of(experts, top_k), passes)
    before_TK = routing(np.random.default_rng(0), 5, experts, top_k)[0]
    assert (read.num_layers, read.num_experts, read.top_k) == (LAYERS, experts, top_k)
    for layer in range(LAYERS):
        assert np.array_equal(read.predict(layer, before_TK), fresh.predict(layer, before_TK))


def test_it_learns_what_follows_what() -> None:
    """Expert e is always followed by e + 1: one token is enough to know, and no frequency tells."""
    table = table_of(8, 1)
    for start in range(400):
        chosen = np.array([[start % 8]])
        table.observe(0, chosen)
        table.observe(1, (chosen + 1) % 8, chosen)
    for expert in range(8):
        assert table.top(1, np.array([[expert]]), 1).tolist() == [(expert + 1) % 8]
        assert table.foresee(1, np.array([[expert]]))[0][(expert + 1) % 8] > 0.8
    assert table.predict(0, np.zeros((16, 1), np.int64)) == pytest.approx(np.full(8, 2.0), rel=0.01)


def test_an_empty_table_says_that_all_are_alike() -> None:
    assert table_of(8, 2).predict(1, np.array([[0, 1]] * 4)) == pytest.approx(np.ones(8))


def test_a_change_of_subject_is_followed_after_the_half_life() -> None:
    before, old, new = (np.full((100, 1), expert) for expert in range(3))
    remembers, forgets = table_of(4, 1), table_of(4, 1, forgets=True)
    for table in (remembers, forgets):
        for after, times in ((old, 50), (new, 5)):
            for _ in range(times):
                table.observe(0, before)
                table.observe(1, after, before)
    assert remembers.top(1, before, 1).tolist() == [1]
    assert forgets.top(1, before, 1).tolist() == [2]


def test_a_lightened_table_says_the_same_and_learns_fast() -> None:
    before, old, new = (np.full((100, 1), expert) for expert in range(3))
    heavy, light = table_of(4, 1), table_of(4, 1)
    for table in (heavy, light):
        for _ in range(50):
            table.observe(0, before)
            table.observe(1, old, before)
    light.lighten()
    assert light.predict(1, before).argmax() == heavy.predict(1, before).argmax() == 1
    for table in (heavy, light):
        table.observe(1, new, before)
    assert heavy.top(1, before, 1).tolist() == [1]
    assert light.top(1, before, 1).tolist() == [2]


def test_a_sample_is_even_and_no_longer_than_asked() -> None:
    rows = np.arange(1000)[:, None]
    assert len(sampled(rows, 128)) <= 128
    assert sampled(rows, 128)[1, 0] - sampled(rows, 128)[0, 0] == 8
    assert sampled(rows[:128], 128) is not rows
    assert len(sampled(rows[:128], 128)) == 128


def test_a_table_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table_of(4, 2).save(path, model="one")
    with pytest.raises(TraceError, match="is of model one, and this one is two; record it for this model") as refusal:
        CorrelationTable.load(path, model="two")
    assert "\n" not in str(refusal.value)
