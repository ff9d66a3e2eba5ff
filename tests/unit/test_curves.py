"""Cost curves at points that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from poise.cost.curves import ClosedFormCurve, PointCurve, non_decreasing
from poise.cost.experts import ExpertCurve
from poise.cost.fit import fit_closed_form
from poise.cost.lookup import attention_curve, expert_curve, token_curve
from poise.cost.transfer import roofline_s, transfer_s
from poise.errors import MachineError
from poise.spec.curve import ClosedForm, Curve, Point, Shape
from poise.spec.machine import Device, Link, Tier

SHAPE = Shape(hidden=2048, intermediate=768, dtype="bfloat16")


def points(*rows: tuple[int, int, float]) -> tuple[Point, ...]:
    return tuple(Point(tokens=tokens, active=active, seconds=seconds) for tokens, active, seconds in rows)


def test_points_are_joined_by_lines_and_go_on_as_they_end() -> None:
    curve = PointCurve([1, 4, 8], [1.0, 1.0, 3.0])
    assert curve.seconds([0, 0.5, 1, 2, 4, 6, 8, 10, 800]).tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 399]
    assert curve.tokens_within([0, 0.5, 1, 2, 3, 4, 399]).tolist() == [0, 0, 4, 6, 8, 10, 800]
    assert curve.max_tokens == 8


def test_a_level_end_goes_on_from_where_it_last_rose() -> None:
    assert PointCurve([1, 2, 4], [1.0, 2.0, 2.0]).seconds(7) == pytest.approx(3.0)
    assert PointCurve([10], [2.0]).seconds([5, 30]).tolist() == [2, 6]


def test_falling_points_are_pooled() -> None:
    assert non_decreasing(np.array([1.0, 5, 3, 4, 9])).tolist() == [1, 4, 4, 4, 9]
    assert PointCurve([1, 2, 3, 4], [2.0, 3.0, 1.0, 4.0]).seconds([1, 2, 3, 4]).tolist() == [2, 2, 2, 4]


def test_the_closed_form_rises_from_its_fixed_cost_to_its_slope() -> None:
    curve = ClosedFormCurve(3.0, 2.0, 2.0)
    assert curve.seconds([0, 2]).tolist() == [0, 5]
    assert curve.seconds(1e9) == pytest.approx(2e9)
    assert curve.tokens_within([1, 3, 5]).tolist() == [0, 0, 2]


def test_experts_one_after_the_other_cost_what_each_costs() -> None:
    one = PointCurve([1, 16], [1.0, 4.0])
    curve = ExpertCurve({1: one})
    assert curve.seconds(32, 2) == pytest.approx(8.0)
    assert curve.seconds([[16], [32]], [1, 2]).tolist() == pytest.approx(np.array([[4.0, 4.8], [7.2, 8.0]]))
    assert curve.of_tokens([[16, 0, 1], [0, 0, 0]]).tolist() == [5, 0]
    assert curve.tokens_within(8.0, 2) == 32


def test_what_many_experts_share_is_interpolated_by_the_logarithm_of_their_number() -> None:
    curve = ExpertCurve({1: PointCurve([1, 2], [2.0, 4.0]), 16: PointCurve([1, 3], [1.0, 3.0])})
    assert curve.seconds(1, 1) == 2
    assert curve.seconds(16, 16) == 16
    assert curve.seconds(4, 4) == pytest.approx(6.0), "half way between 2 and 1, times 4"
    assert curve.seconds(64, 64) == 64, "beyond what was measured, as the nearest"
    for active in (1, 3, 4, 16, 50):
        tokens = active * np.array([0.0, 1.0, 1.5, 2.5, 3.0])
        assert curve.at_active(active).seconds(tokens) == pytest.approx(curve.seconds(tokens, active))


def test_more_active_experts_follow_the_shape_of_one() -> None:
    curve = ExpertCurve.from_points({1: ([1, 2, 4, 8], [3.0, 4.0, 6.0, 10.0]), 4: ([1, 4], [2.0, 4.0])})
    assert curve.seconds([4, 8, 16, 32, 64], 4).tolist() == pytest.approx([8, 4 * (4 - 4 / 3), 16, 32, 64])


def test_curves_of_a_device_are_divided_by_its_speed() -> None:
    curves = (
        Curve(kind="expert", shape=SHAPE, points=points((1, 1, 2.0), (4, 1, 8.0), (8, 4, 16.0))),
        Curve(
            kind="gate",
            shape=SHAPE,
            points=points(
                (1, 1, 1.0),
            ),
        ),
        Curve(kind="dense", shape=SHAPE, closed_form=ClosedForm(a_s=6.0, b_s=4.0, p=2.0)),
    )
    device = Device(name="slow", memory_bytes=1, speed=0.5, curves=curves)
    assert expert_curve(device, SHAPE).seconds([4, 8], [1, 4]).tolist() == [16, 32]
    assert token_curve(device, "gate", SHAPE).seconds(1) == 2
    assert token_curve(device, "dense", SHAPE).seconds(2) == 20


def test_a_closed_form_of_experts_has_a_fixed_cost_for_each() -> None:
    curve = Curve(kind="expert", shape=SHAPE, closed_form=ClosedForm(a_s=3.0, b_s=2.0, p=2.0))
    found = expert_curve(Device(name="cpu", memory_bytes=1, curves=(curve,)), SHAPE)
    assert found.seconds(8, 4) == pytest.approx(20.0)
    assert found.tokens_within(20.0, 4) == pytest.approx(8.0)


def test_attention_is_linear_in_the_context_and_takes_the_nearest_rows() -> None:
    def curve(context: int, rows: int, seconds: float) -> Curve:
        return Curve(
            kind="attention",
            shape=SHAPE,
            points=points((8, 1, seconds)),
            context_tokens=context,
            row_tokens=rows,
        )

    device = Device(
        name="cpu",
        memory_bytes=1,
        curves=(curve(64, 1, 1.0), curve(256, 1, 2.0), curve(1024, 1, 3.0), curve(64, 64, 9.0)),
    )
    decode = attention_curve(device, SHAPE, row_tokens=2)
    assert decode.row_tokens == 1
    assert decode.seconds(8, [8, 64, 160, 640, 1024, 1792]).tolist() == [1, 1, 1.5, 2.5, 3, 4]
    assert attention_curve(device, SHAPE, row_tokens=512).seconds([8, 16], 999).tolist() == [9, 18]


def test_a_shape_that_was_not_measured_is_refused() -> None:
    device = Device(name="cpu", memory_bytes=1, curves=(Curve(kind="expert", shape=SHAPE, points=points((1, 1, 1.0))),))
    other = Shape(hidden=1, intermediate=2, dtype="float32")
    with pytest.raises(MachineError, match=r"no expert curve for 1 x 2 float32; measured: 2048 x 768 bfloat16; `poise"):
        expert_curve(device, other)
    with pytest.raises(MachineError, match="no gate curve for 2048 x 768 bfloat16; measured: none"):
        token_curve(device, "gate", SHAPE)


def test_transfers_and_the_roofline() -> None:
    link = Link(source="a", target="b", bytes_per_s=100.0, latency_s=0.5)
    assert transfer_s([0, 100, 200], link).tolist() == [0, 1.5, 2.5]
    assert transfer_s(100, Tier(name="disk", capacity_bytes=1, bytes_per_s=50.0)) == 2
    assert roofline_s([10, 100], [100, 10], bytes_per_s=10, flops_per_s=10).tolist() == [10, 10]


def test_a_fit_says_how_far_it_is_from_each_point() -> None:
    exact = ClosedFormCurve(1e-3, 1e-5, 3.0)
    tokens = 2.0 ** np.arange(13)
    seconds = exact.seconds(tokens)
    seconds[4] *= 1.1
    fit = fit_closed_form(tokens, seconds)
    assert fit.relative_errors[4] == pytest.approx(1 / 1.1 - 1, abs=0.02)
    assert fit.worst_error == max(map(abs, fit.relative_errors))
    assert fit.form.a_s == pytest.approx(1e-3, rel=0.05)
    assert fit.form.b_s == pytest.approx(1e-5, rel=0.05)
