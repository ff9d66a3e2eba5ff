"""Strong scaling: the same passes on one rank with a core, and on two with a core each, over loopback and over slow links.

Prefill passes of ``PREFILL_ROWS`` prompts, then decode passes of ``DECODE_ROWS`` sequences, in all. Experts lie as engines
first have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import slow_link, two_ranks
from poise.bench.parallel.case import DTYPE, MEMORY, Case, cycled, one_rank, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

PREFILL_ROWS = 8
DECODE_ROWS = 32
PASSES = 8
NEW_TOKENS = 48
WARM_UP = 2
LAYOUTS = (one_rank, two_ranks, slow_link)


def measure(cases: Sequence[Case], directory: Path, *, passes: int = PASSES) -> dict[str, Any]:
    """Median time of a pass for each model, kind of pass and layout, and how much faster than one rank."""
    rows: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        with Session(layout()) as session:
            for case in cases:
                rows += [
                    {"model": case.name, "layout": session.layout.name, "pass": kind, **_facts(result)}
                    for kind, result in _runs(session, case, directory, passes)
                ]
    alone = {(row["model"], row["pass"]): row["step_s"] for row in rows if row["layout"] == one_rank().name}
    for row in rows:
        row["speedup"] = alone[row["model"], row["pass"]] / row["step_s"]
    return {"rows": rows}


def _runs(session: Session, case: Case, directory: Path, passes: int) -> Sequence[tuple[str, JobResult]]:
    ranks = len(session.layout.ranks)
    text = next(iter(case.rows.values()))
    prompts = write_rows(directory / f"{case.model.name}-prefill.json", cycled(text, (passes + WARM_UP) * PREFILL_ROWS))
    starts = write_rows(directory / f"{case.model.name}-decode.json", cycled(text, DECODE_ROWS)[:, :32])
    decode = {
        "model": str(case.model),
        "memory": MEMORY,
        "dtype": DTYPE,
        "balance": "static",
        "groups": [[DECODE_ROWS // ranks, 1]],
        "prompts": starts,
        "new_tokens": NEW_TOKENS,
    }
    return [
        (
            f"prefill of {PREFILL_ROWS} rows",
            session.run(prefill_job(case, prompts, rows_per_rank=PREFILL_ROWS // ranks)),
        ),
        (f"decode of {DECODE_ROWS} rows", session.run(decode)),
    ]


def _facts(result: JobResult) -> dict[str, Any]:
    step_P = result.step_s_P[WARM_UP:]
    figures: Mapping[str, Any] = result.facts["figures"]
    total_s = sum(figures["steps"]["pass_s"])
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "passes": len(step_P),
        "token_imbalance": figures["imbalance"]["mean"],
        "expert_frac": [seconds / total_s for seconds in figures["ranks"]["expert_s"]],
        "waited_frac": [seconds / total_s for seconds in figures["ranks"]["waited_s"]],
        "exchange_frac": [seconds / total_s for seconds in figures["ranks"]["exchange_s"]],
        "rest_frac": [seconds / total_s for seconds in figures["ranks"]["rest_s"]],
    }
