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

PREFILL_ROWS = (8, 32)
"""Of each rank: the first pass is too small for halves, and shows what two batches in lockstep cost."""
PROMPTS = 2
"""That each row of a pass is given, one after the other; each takes several passes, as it goes through in chunks."""
WARM_UP = 2
ROUNDS = 2
LINKS = (two_ranks(), two_ranks().with_link(4 * GBIT_PER_S), slow_link())
WAYS = ("whole", "halves")


def measure(case: Case, directory: Path, *, prompts: int = PROMPTS) -> dict[str, Any]:
    """Median time of prefill passes, as one batch and as two, for each link."""
    jobs = _jobs(case, directory, prompts)
    rows = []
    for layout in LINKS:
        results: dict[tuple[str, str], list[JobResult]] = {(kind, way): [] for kind in jobs for way in WAYS}
        with Session(layout) as session:
            for number in range(ROUNDS):
                for kind, job in jobs.items():
                    size = job["groups"][0][0]
                    shapes = {"whole": [[size, 1]], "halves": [[size // 2, 2]]}
                    for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                        results[kind, way].append(session.run({**job, "groups": shapes[way]}))
        for kind in jobs:
            rows.append(
                {
                    "layout": layout.name,
                    "pass": kind,
                    "passes_in_halves": sum(each.facts["passes_in_halves"] for each in results[kind, "halves"]),
                    **{way: _facts(results[kind, way]) for way in WAYS},
                }
            )
    return {"model": case.name, "rows": rows}


def _jobs(case: Case, directory: Path, prompts: int) -> dict[str, dict[str, Any]]:
    text, ranks = next(iter(case.rows.values())), 2
    jobs = {}
    for rows in PREFILL_ROWS:
        file = write_rows(directory / f"halves-{rows}.json", cycled(text, prompts * rows * ranks))
        jobs[f"prefill of {rows} rows a rank"] = prefill_job(case, file, rows_per_rank=rows)
    return jobs


def _facts(runs: list[JobResult]) -> dict[str, Any]:
    step_P = np.concatenate([each.step_s_P[WARM_UP:] for each in runs])
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "passes": len(step_P),
    }
