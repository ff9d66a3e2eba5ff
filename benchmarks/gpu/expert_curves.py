"""What experts cost on this GPU, by `poise profile`'s own code, beside the curve that comes with Poise for its kind.

The engine computes a rank's experts one after the other (a handful of kernels each); the bundled curve is of one fused kernel
for all of them. A grouped product stands between: what the engine would take if it had one.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.gpu.layers import SHAPES, GroupedExperts, rows_for, subject_of
from benchmarks.gpu.timing import device_s
from poise.cost.lookup import expert_curve
from poise.profile.devices import clock_of
from poise.profile.experts import expert_run, load_experts
from poise.profile.measure import measure
from poise.spec.bundled import find_machine
from poise.units import GIB

ACTIVE = 16
"""Experts of a rank, of 128 over 8."""
PER_EXPERT = (1, 4, 16, 64, 256, 1024)
DEVICE = "cuda:0"


def expert_curves(cap_s: float) -> list[dict[str, object]]:
    """Rows of tokens, active experts and seconds, each with the bundled curve's. ``cap_s``: for each shape, at most."""
    rows: list[dict[str, object]] = []
    for name in SHAPES:
        subject = subject_of(name)
        bundled = expert_curve(find_machine("h200").devices[0], subject.expert_shape)
        experts = load_experts(subject, scratch_bytes=2 * GIB, device=DEVICE)
        grid = [(each * active, active) for active in (1, ACTIVE) for each in PER_EXPERT]
        clock = clock_of(DEVICE)
        runs = [expert_run(subject, experts, tokens=n, active=e, clock=clock, device=DEVICE) for n, e in grid]
        measured = measure(runs, cap_s=cap_s, clock=clock)
        grouped, count = GroupedExperts(name, ACTIVE), dict[int, float]()
        for each in PER_EXPERT:
            hidden_PH, ends_E = rows_for(np.full(ACTIVE, each), grouped.hidden)
            count[each] = device_s({"grouped": partial(grouped, hidden_PH, ends_E)})["grouped"]
        for (tokens, active), (time_s,) in zip(grid, measured, strict=True):
            flops = float(tokens * subject.expert_flops_per_token)
            rows.append(
                {
                    "model": name,
                    "tokens": tokens,
                    "active": active,
                    "engine_s": time_s.seconds,
                    "is_certain": time_s.is_certain,
                    "grouped_s": count[tokens // active] if active == ACTIVE else None,
                    "bundled_h200_s": float(bundled.seconds(float(tokens), float(active))),
                    "engine_flops_per_s": flops / time_s.seconds,
                }
            )
    return rows
