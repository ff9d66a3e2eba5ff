"""Strong scaling: the same passes on one rank with a core, and on two with a core each, over loopback and over slow links.

Prefill passes of ``PREFILL_ROWS`` prompts, then decode passes of ``DECODE_ROWS`` sequences, in all. Experts lie as engines
first have them. The ranks of all layouts stay, and layouts take turns (A B C C B A), so that each is measured early and late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import slow_link, two_ranks
from poise.bench.parallel.case import DTYPE, MEMORY, Case, cycled, one_rank, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

PREFILL_ROWS = 8
DECODE_ROWS = 32
PASSES = 8
NEW_TOKENS = 26
WARM_UP = 2
ROUNDS = 2
LAYOUTS = (one_rank, two_ranks, slow_link)


def measure(cases: Sequence[Case], directory: Path, *, passes: int = PASSES) -> dict[str, Any]:
    """Median time of a pass for each model, kind of pass and layout, and how much faster than one rank. ``passes``: of prefill,
    in all rounds."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(layout())) for layout in LAYOUTS]
        for case in cases:
            for kind, job in _jobs(case, directory, -(-passes // ROUNDS)).items():
                runs: dict[str, list[JobResult]] = {session.layout.name: [] for session in sessions}
                for number in range(ROUNDS):
                    for session in sessions if number % 2 == 0 else sessions[::-1]:
                        runs[session.layout.name].append(session.run(_for_ranks(job, len(session.layout.ranks))))
                rows += [
                    {"model": case.name, "layout": layout, "pass": kind, **_facts(each)}
                    for layout, each in runs.items()
                ]
    alone = {(row["model"], row["pass"]): row["step_s"] for row in rows if row["layout"] == one_rank().name}
    for row in rows:
        row["speedup"] = alone[row["model"], row["pass"]] / row["step_s"]
    return {"rows": rows}


def _jobs(case: Case, directory: Path, passes: int) -> Mapping[str, Mapping[str, Any]]:
    """By kind of pass, with the rows of one rank that has all of them."""
    text = next(iter(case.rows.values()))
    prompts = write_rows(directory / f"{case.model.name}-prefill.json", cycled(text, (passes + WARM_UP) * PREFILL_ROWS))
    starts = write_rows(directory / f"{case.model.name}-decode.json", cycled(text, DECODE_ROWS)[:, :32])
    decode = {
        "model": str(case.model),
        "memory": MEMORY,
        "dtype": DTYPE,
        "balance": "static",
        "groups": [[DECODE_ROWS, 1]],
        "prompts": starts,
        "new_tokens": NEW_TOKENS,
    }
    return {
        f"prefill of {PREFILL_ROWS} rows": prefill_job(case, prompts, rows_per_rank=PREFILL_ROWS),
        f"decode of {DECODE_ROWS} rows": decode,
    }


def _for_ranks(job: Mapping[str, Any], ranks: int) -> Mapping[str, Any]:
    ((rows, batches),) = job["groups"]
    return {**job, "groups": [[rows // ranks, batches]]}


def _facts(runs: Sequence[JobResult]) -> dict[str, Any]:
    step_P = np.concatenate([each.step_s_P[WARM_UP:] for each in runs])
    figures: Sequence[Mapping[str, Any]] = [each.facts["figures"] for each in runs]
    total_s = sum(sum(each["steps"]["pass_s"]) for each in figures)
    shares = {
        f"{name}_frac": (np.sum([each["ranks"][f"{name}_s"] for each in figures], axis=0) / total_s).tolist()
        for name in ("expert", "waited", "exchange", "rest")
    }
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "step_s_by_round": [float(np.median(each.step_s_P[WARM_UP:])) for each in runs],
        "passes": len(step_P),
        "token_imbalance": float(np.mean([each["imbalance"]["mean"] for each in figures])),
        **shares,
    }
