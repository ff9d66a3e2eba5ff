"""A page with the cost curves of a machine: one file of HTML that needs nothing else, also offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from poise.cost.curves import ClosedFormCurve
from poise.cost.fit import fit_closed_form
from poise.errors import UsageError
from poise.spec.curve import KINDS, Curve, Point
from poise.spec.machine import Device, Machine
from poise.spec.whole_file import write_whole

FEW_POINTS = 4
"""Fewer say nothing about how well the closed form fits."""


def require_plotly() -> None:
    """Raises UsageError where Plotly is not installed: before anything is measured for a report."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise UsageError("--report needs Plotly, which is not installed; run: pip install 'poise[report]'") from None


def write_curves(machine: Machine, path: Path) -> None:
    """Writes the page whole or not at all. Raises UsageError if it cannot be written, or without Plotly."""
    page = curves_figure(machine).to_html(include_plotlyjs=True, full_html=True)
    try:
        write_whole(path, page)
    except OSError as error:
        raise UsageError(f"report {path} cannot be written ({error.strerror}); name another file") from None


def curves_figure(machine: Machine) -> Any:
    """A Plotly figure: a plot for each kind of work that has curves, time against tokens, both logarithmic."""
    require_plotly()
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    kinds = [kind for kind in KINDS if any(curve.kind == kind for device in machine.devices for curve in device.curves)]
    figure = make_subplots(rows=max(1, len(kinds)), cols=1, subplot_titles=kinds, vertical_spacing=0.08)
    for row, kind in enumerate(kinds, start=1):
        for device in machine.devices:
            for curve in device.curves:
                if curve.kind == kind:
                    for trace in _traces(device, curve):
                        figure.add_trace(go.Scatter(**trace), row=row, col=1)
        figure.update_xaxes(type="log", title="tokens", row=row, col=1)
        figure.update_yaxes(type="log", title="seconds", row=row, col=1)
    figure.update_layout(title=_title(machine), height=200 + 420 * max(1, len(kinds)), template="plotly_white")
    return figure


def _traces(device: Device, curve: Curve) -> Iterator[dict[str, Any]]:
    """Points joined by lines for each number of active experts; beside one expert's points the closed form, dotted."""
    label = f"{device.name}, {curve.kind}, {curve.shape}"
    if curve.context_tokens is not None:
        label += f", context {curve.context_tokens}, {curve.row_tokens} a row"
    if curve.closed_form is not None:
        form, tokens = curve.closed_form, np.geomspace(1, 4096, 60)
        drawn = ClosedFormCurve(form.a_s, form.b_s, form.p).seconds(tokens) / device.speed
        yield {"x": tokens, "y": drawn, "mode": "lines", "name": f"{label}, closed form"}
        return
    for active in sorted({point.active for point in curve.points}):
        points = sorted((p for p in curve.points if p.active == active), key=lambda point: point.tokens)
        name = label if curve.kind != "expert" else f"{label}, {active} active"
        seconds = [point.seconds / device.speed for point in points]
        yield {"x": [point.tokens for point in points], "y": seconds, "mode": "lines+markers", "name": name}
        if curve.kind == "expert" and active == 1 and len(points) >= FEW_POINTS:
            yield _fitted(points, device.speed, label)


def _fitted(points: list[Point], speed: float, label: str) -> dict[str, Any]:
    fit = fit_closed_form([point.tokens for point in points], [point.seconds / speed for point in points])
    tokens = np.geomspace(points[0].tokens, points[-1].tokens, 60)
    seconds = ClosedFormCurve(fit.form.a_s, fit.form.b_s, fit.form.p).seconds(tokens)
    name = f"{label}, closed form, worst error {fit.worst_error:.0%}"
    return {"x": tokens, "y": seconds, "mode": "lines", "line": {"dash": "dot"}, "name": name}


def _title(machine: Machine) -> str:
    measured = machine.measured
    tiers = ", ".join(f"{tier.name} {tier.bytes_per_s / 1e9:.2f} GB/s" for tier in machine.tiers)
    where = f"{measured.cpu}, {measured.threads} threads, torch {measured.torch}, {measured.date}" if measured else ""
    return "<br>".join(line for line in (where, tiers) if line)
