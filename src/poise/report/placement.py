"""A page with a placement before and after: how long each device takes for each layer, as two heatmaps with one scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.errors import UsageError
from poise.report.curves import require_plotly
from poise.spec.whole_file import write_whole

Floats = npt.NDArray[np.float64]


def write_placement_page(path: Path, *, before_s_LR: Floats, after_s_LR: Floats, **labels: Any) -> None:
    """Writes the page whole or not at all; ``labels`` as ``placement_figure`` takes them. Raises UsageError."""
    figure = placement_figure(before_s_LR=before_s_LR, after_s_LR=after_s_LR, **labels)
    try:
        write_whole(path, figure.to_html(include_plotlyjs=True, full_html=True))
    except OSError as error:
        raise UsageError(f"report {path} cannot be written ({error.strerror}); name another file") from None


def placement_figure(
    *, before_s_LR: Floats, after_s_LR: Floats, layers: Sequence[int], devices: Sequence[str], title: str
) -> Any:
    """A Plotly figure. Colours: time over the mean of the layer's devices before, so that both maps compare: a row of one
    colour is a layer whose devices finish together, and paler after than before is faster."""
    require_plotly()
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    mean_L1 = before_s_LR.mean(axis=1, keepdims=True)
    relative = [seconds_LR / np.where(mean_L1 > 0, mean_L1, 1.0) for seconds_LR in (before_s_LR, after_s_LR)]
    scale = {"zmin": 0.0, "zmax": float(max(each.max() for each in relative)), "coloraxis": "coloraxis"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=("before", "after"), shared_yaxes=True)
    for column, (ratio_LR, seconds_LR) in enumerate(zip(relative, (before_s_LR, after_s_LR), strict=True), start=1):
        heatmap = go.Heatmap(
            z=ratio_LR,
            x=list(devices),
            y=[f"layer {layer}" for layer in layers],
            customdata=seconds_LR * 1e6,
            hovertemplate="%{y}, %{x}: %{customdata:.1f} us, %{z:.2f} of the layer's mean before<extra></extra>",
            coloraxis=scale["coloraxis"],
        )
        figure.add_trace(heatmap, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        title=title,
        height=260 + 18 * len(layers),
        template="plotly_white",
        coloraxis={
            "colorscale": "YlOrRd",
            "cmin": scale["zmin"],
            "cmax": scale["zmax"],
            "colorbar": {"title": "time / mean before"},
        },
    )
    return figure
