"""What holds for every cost curve: it never falls, its inverse is one, a fit finds what made the points; files round-trip."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cost.attention import AttentionCurve
from poise.cost.curves import ClosedFormCurve, PointCurve, TokenCurve, non_decreasing
from poise.cost.experts import ExpertCurve
from poise.cost.fit import fit_closed_form
from poise.spec.curve import ClosedForm, Curve, Point, Shape
from poise.spec.machine import Device, Link, Machine, Provenance, Tier

seconds = st.floats(1e-7, 1e2)
rates = st.floats(1.0, 1e13)
names = st.text(min_size=1, max_size=8)


@st.composite
def point_curves(draw: st.DrawFn) -> PointCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 10_000), min_size=1, max_size=12)))
    return PointCurve(tokens, draw(st.lists(seconds, min_size=len(tokens), max_size=len(tokens))))


closed_curves = st.builds(ClosedFormCurve, st.floats(1e-7, 1.0), st.floats(1e-9, 1e-2), st.floats(0.25, 32.0))
token_curves = point_curves() | closed_curves
grids = st.lists(st.floats(0.0, 1e5, allow_subnormal=False), min_size=2, max_size=30).map(sorted)


@given(token_curves, grids)
def test_more_tokens_never_take_less(curve: TokenCurve, tokens: list[float]) -> None:
    times = curve.seconds(tokens)
    assert (np.diff(times) >= -1e-12 * times[1:]).all()
    assert curve.seconds(0.0) == 0


@given(token_curves, st.lists(st.floats(0.0, 1e3), min_size=1, max_size=30))
def test_the_inverse_gives_the_most_tokens_in_time(curve: TokenCurve, times: list[float]) -> None:
    tokens = curve.tokens_within(times)
    limit = np.array(times)
    reached = tokens > 0
    assert (curve.seconds(tokens) <= limit * (1 + 1e-6)).all()
    assert (curve.seconds(tokens[reached] * 1.001 + 1e-3) >= limit[reached] * (1 - 1e-6)).all()
    assert (curve.seconds(1e-9) > limit[~reached] * (1 - 1e-6)).all(), "where not one fits, not one fits"


@given(token_curves, st.integers(1, 256), grids)
def test_repeated_work_takes_as_often_as_long(curve: TokenCurve, count: int, tokens: list[float]) -> None:
    each = np.array(tokens)
    assert curve.repeated(count).seconds(each * count) == pytest.approx(count * curve.seconds(each), rel=1e-9)


@given(st.dictionaries(st.integers(1, 256), point_curves(), min_size=1, max_size=3), st.floats(1.0, 300.0), grids)
def test_experts_at_a_fixed_number_are_a_curve(
    per_expert: dict[int, PointCurve], active: float, tokens: list[float]
) -> None:
    curve = ExpertCurve(dict(per_expert))
    fixed = curve.at_active(active)
    times = curve.seconds(tokens, active)
    assert fixed.seconds(tokens) == pytest.approx(times, rel=1e-6)
    assert (np.diff(times) >= -1e-9 * times[1:]).all()


@given(
    st.dictionaries(st.integers(1, 4096), point_curves(), min_size=1, max_size=4),
    st.floats(1, 1e4),
    st.lists(st.floats(1, 1e5), min_size=2, max_size=20).map(sorted),
)
def test_attention_never_falls_with_the_context(
    by_context: dict[int, PointCurve], tokens: float, contexts: list[float]
) -> None:
    times = AttentionCurve(1, dict(by_context)).seconds(tokens, contexts)
    assert (np.diff(times) >= -1e-9 * times[1:]).all()
    assert (times > 0).all()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_pooling_gives_the_nearest_rising_sequence(values: list[float]) -> None:
    pooled = non_decreasing(np.array(values))
    assert (np.diff(pooled) >= 0).all()
    assert pooled.mean() == pytest.approx(np.mean(values), abs=1e-9)
    rising = np.array(sorted(values))
    assert ((pooled - values) ** 2).sum() <= ((rising - values) ** 2).sum() + 1e-6


@settings(max_examples=50)
@given(st.floats(1e-5, 1e-1), st.floats(2.0, 500.0), st.floats(0.5, 12.0))
def test_a_fit_recovers_the_closed_form(a_s: float, knee_tokens: float, p: float) -> None:
    b_s = a_s / knee_tokens
    tokens = np.geomspace(1, 4096, 25)
    fit = fit_closed_form(tokens, ClosedFormCurve(a_s, b_s, p).seconds(tokens))
    assert fit.worst_error < 1e-3
    assert fit.form.a_s == pytest.approx(a_s, rel=0.05)
    assert fit.form.b_s == pytest.approx(b_s, rel=0.05)


shapes = st.builds(Shape, hidden=st.integers(1, 1 << 20), intermediate=st.integers(1, 1 << 20), dtype=names)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    kind = draw(st.sampled_from(["expert", "attention", "gate", "dense"]))
    row = draw(st.integers(1, 100))
    extra = {"row_tokens": row, "context_tokens": row + draw(st.integers(0, 100))} if kind == "attention" else {}
    if draw(st.booleans()):
        form = ClosedForm(a_s=draw(seconds), b_s=draw(seconds), p=draw(st.floats(0.1, 100)))
        return Curve(kind=kind, shape=draw(shapes), closed_form=form, **extra)
    active = st.integers(1, 64) if kind == "expert" else st.just(1)
    places = draw(st.sets(st.tuples(st.integers(64, 4096), active), min_size=1, max_size=5))
    made = tuple(Point(tokens=tokens, active=each, seconds=draw(seconds)) for tokens, each in sorted(places))
    return Curve(kind=kind, shape=draw(shapes), points=made, **extra)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    places = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    devices = tuple(
        Device(
            name=name,
            memory_bytes=draw(st.integers(1, 1 << 50)),
            speed=draw(st.floats(0.1, 10)),
            curves=tuple(draw(st.lists(curves(), max_size=2, unique_by=lambda curve: (curve.kind, str(curve.shape))))),
        )
        for name in places[1:]
    )
    tier = Tier(name=places[0], capacity_bytes=draw(st.integers(1, 1 << 50)), bytes_per_s=draw(rates))
    ends = st.sampled_from(places)
    link = Link(source=draw(ends), target=draw(ends), bytes_per_s=draw(rates), latency_s=draw(st.floats(0, 1)))
    measured = Provenance(date=draw(names), cpu=draw(names), threads=draw(st.integers(1, 512)), torch="2", poise="0")
    return Machine(devices=devices, links=(link,), tiers=(tier,), measured=draw(st.none() | st.just(measured)))


@settings(max_examples=100)
@given(machines())
def test_every_machine_round_trips(machine: Machine) -> None:
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
