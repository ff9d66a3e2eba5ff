"""What passes in halves bring: their prompts as one batch, or as two of which one computes while the other travels.

Two ranks with a core each, over loopback and over links of 4 and 1 Gbit/s, taking turns. Passes of two batches run in halves
where the engine finds that worth it (decision 032).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import GBIT_PER_S, slow_link, two_ranks
from poise.bench.parallel.case import Case, cycled, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

ROWS_PER_RANK = 8
PASSES = 6
WARM_UP = 2
ROUNDS = 2
LINKS = (two_ranks(), two_ranks().with_link(4 * GBIT_PER_S), slow_link())
WAYS = {"whole": [[ROWS_PER_RANK, 1]], "halves": [[ROWS_PER_RANK // 2, 2]]}
"""Batch size and number of batches."""


def measure(case: Case, directory: Path, *, passes: int = PASSES) -> dict[str, Any]:
    """Median time of a pass, whole and in halves, for each link."""
    count = (passes + WARM_UP) * ROWS_PER_RANK * 2
    prompts = write_rows(directory / f"{case.model.name}-halves.json", cycled(next(iter(case.rows.values())), count))
    rows = []
    for layout in LINKS:
        results: dict[str, list[JobResult]] = {name: [] for name in WAYS}
        with Session(layout) as session:
            for number in range(ROUNDS):
                for name in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
                    job = prefill_job(case, prompts, rows_per_rank=ROWS_PER_RANK)
                    results[name].append(session.run({**job, "groups": WAYS[name]}))
        rows.append(
            {
                "layout": layout.name,
                "passes_in_halves": sum(each.facts["passes_in_halves"] for each in results["halves"]),
                **{name: _facts(runs) for name, runs in results.items()},
            }
        )
    return {"model": case.name, "rows_per_rank": ROWS_PER_RANK, "rows": rows}


def _facts(runs: list[JobResult]) -> dict[str, Any]:
    step_P = np.concatenate([each.step_s_P[WARM_UP:] for each in runs])
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "passes": len(step_P),
    }
