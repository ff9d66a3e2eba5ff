"""What passes in halves bring: the same tokens as one batch, as two in lockstep, or as two of which one computes while the
other travels.

Two ranks with a core each, over loopback and over links of 4 and 1 Gbit/s, taking turns. The engine itself runs passes in
halves where an expert gets rows enough (decision 032), which the passes here would not give it: it is told to, or not to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import GBIT_PER_S, slow_link, two_ranks
from poise.bench.parallel.case import Case, cycled, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

PREFILL_ROWS, DECODE_ROWS = 8, 64
"""Of each rank. Prompts go in by 512 tokens a pass: of more rows, only one batch would come in at a time."""
NEW_TOKENS = 16
PROMPTS = 3
"""That each row of a pass is given, one after the other; each takes several passes, as it goes through in chunks."""
WARM_UP = 2
ROUNDS = 2
LINKS = (two_ranks(), two_ranks().with_link(4 * GBIT_PER_S), slow_link())
WAYS = ("whole", "lockstep", "halves")
NEVER, ALWAYS = 1 << 30, 0
"""Rows from which halves run."""


def measure(case: Case, directory: Path, *, prompts: int = PROMPTS) -> dict[str, Any]:
    """Median time of passes, each way, for each link."""
    jobs = _jobs(case, directory, prompts)
    rows = []
    for layout in LINKS:
        results: dict[tuple[str, str], list[JobResult]] = {(kind, way): [] for kind in jobs for way in WAYS}
        with Session(layout) as session:
            for number in range(ROUNDS):
                for kind, job in jobs.items():
                    size = job["groups"][0][0]
                    two = {"groups": [[size // 2, 2]]}
                    given: dict[str, dict[str, Any]] = {
                        "whole": {},
                        "lockstep": two | {"min_half_rows": NEVER},
                        "halves": two | {"min_half_rows": ALWAYS},
                    }
                    for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                        results[kind, way].append(session.run(job | given[way]))
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
    whole = write_rows(directory / "halves.json", cycled(text, prompts * PREFILL_ROWS * ranks))
    starts = write_rows(directory / "halves-decode.json", cycled(text, DECODE_ROWS * ranks)[:, :8])
    decode = prefill_job(case, starts, rows_per_rank=DECODE_ROWS)
    return {
        "prefill": prefill_job(case, whole, rows_per_rank=PREFILL_ROWS),
        f"decode of {DECODE_ROWS} rows a rank": decode | {"new_tokens": NEW_TOKENS},
    }


def _facts(runs: list[JobResult]) -> dict[str, Any]:
    step_P = np.concatenate([each.step_s_P[WARM_UP:] for each in runs])
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "passes": len(step_P),
    }
