"""The curves of a device, ready to evaluate. A shape that was not measured is refused, never guessed from another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poise.cost.attention import AttentionCurve
from poise.cost.curves import ClosedFormCurve, PointCurve, TokenCurve
from poise.cost.experts import ExpertCurve
from poise.errors import MachineError
from poise.spec.curve import ClosedForm, Curve, CurveKind, Point, Shape
from poise.spec.machine import Device


def expert_curve(device: Device, shape: Shape) -> ExpertCurve:
    """T(tokens, active experts). Raises MachineError if the shape was not measured."""
    (curve,) = _curves(device, "expert", shape)
    if curve.closed_form is not None:
        return ExpertCurve({1: _closed(curve.closed_form, device.speed)})
    actives = sorted({point.active for point in curve.points})
    return ExpertCurve.from_points({active: _points(curve.points, active, device.speed) for active in actives})


def token_curve(device: Device, kind: CurveKind, shape: Shape) -> TokenCurve:
    """T(tokens) of a gate or of the dense head. Raises MachineError if the shape was not measured."""
    assert kind in ("gate", "dense"), f"{kind} does not depend on tokens alone"
    (curve,) = _curves(device, kind, shape)
    return _of_tokens(curve, device.speed)


def attention_curve(device: Device, shape: Shape, *, row_tokens: int) -> AttentionCurve:
    """T(tokens, context) from the curves whose ``row_tokens`` are nearest, as a ratio. Raises MachineError if there is none."""
    curves = _curves(device, "attention", shape)
    measured = {curve.row_tokens or 1 for curve in curves}
    nearest = min(measured, key=lambda rows: (abs(math.log(rows / row_tokens)), rows))
    chosen = {
        curve.context_tokens or 1: _of_tokens(curve, device.speed)
        for curve in curves
        if (curve.row_tokens or 1) == nearest
    }
    return AttentionCurve(nearest, chosen)


def _curves(device: Device, kind: CurveKind, shape: Shape) -> list[Curve]:
    found = [curve for curve in device.curves if curve.kind == kind and curve.shape == shape]
    if not found:
        known = ", ".join(dict.fromkeys(str(curve.shape) for curve in device.curves if curve.kind == kind)) or "none"
        raise MachineError(
            f"device {device.name!r} has no {kind} curve for {shape}; measured: {known}; "
            "`poise profile MODEL --output FILE` measures those of a model"
        )
    return found


def _of_tokens(curve: Curve, speed: float) -> TokenCurve:
    if curve.closed_form is not None:
        return _closed(curve.closed_form, speed)
    return PointCurve(*_points(curve.points, 1, speed))


def _points(points: Sequence[Point], active: int, speed: float) -> tuple[list[float], list[float]]:
    """Tokens and seconds of one expert, where so many are active."""
    chosen = sorted((point.tokens, point.seconds) for point in points if point.active == active)
    return [tokens / active for tokens, _ in chosen], [seconds / active / speed for _, seconds in chosen]


def _closed(form: ClosedForm, speed: float) -> ClosedFormCurve:
    return ClosedFormCurve(form.a_s / speed, form.b_s / speed, form.p)
