"""Predictors that see a domain which they do not know, on real ranks: what they guess wrong, with and without learning.

Passes over prose, then over code, all of new prompts. Guesses of a pass are judged as they were made in it: a predictor has
learnt from the passes before at most. Of code nothing repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.parallel.case import Case, cycled, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

BEFORE, AFTER = 16, 64
"""Passes over prose, which files were distilled on, and over code."""
BLOCK_PASSES = 8


def learning_through_a_switch(session: Session, case: Case, directory: Path, on_prose: Path) -> dict[str, Any]:
    """By contender, means of blocks of passes. ``on_prose``: a predictor that knows the first domain."""
    ranks = len(session.layout.ranks)
    rows = [cycled(case.rows["prose"], BEFORE * ranks), cycled(case.rows["code"], AFTER * ranks)]
    job = prefill_job(case, write_rows(directory / "online.json", np.concatenate(rows)), rows_per_rank=1)
    contenders: Mapping[str, Mapping[str, Any]] = {
        "distilled on prose": {"lookahead": str(on_prose)},
        "the same, online": {"lookahead": str(on_prose), "online": True},
        "the same, on a thread beside": {"lookahead": str(on_prose), "online": True, "ahead": "thread"},
        "routers, online": {"online": True},
    }
    return {
        "block_passes": BLOCK_PASSES,
        "passes_before": BEFORE,
        "policies": {
            name: _facts(session.run({**job, "balance": "probe", "steps": steps})) for name, steps in contenders.items()
        },
    }


def _facts(result: JobResult) -> dict[str, Any]:
    """Shares, imbalances of tokens, medians of steps, by block; what learning took of the passes' time, mean over ranks."""
    told = result.facts["balanced"]
    steps = {name: np.asarray(values_P, dtype=float) for name, values_P in told["steps"].items()}
    ends = range(BLOCK_PASSES, len(steps["pass_s"]), BLOCK_PASSES)
    blocks = {name: np.split(values_P, ends) for name, values_P in steps.items()}
    return {
        "guessed_wrong_frac": [
            float(wrong.sum() / own.sum())
            for wrong, own in zip(blocks["guessed_wrong"], blocks["own_pairs"], strict=True)
        ],
        **{name: [float(block.mean()) for block in blocks[name]] for name in ("home_imbalance", "imbalance")},
        "step_s": [float(np.median(block)) for block in np.split(result.step_s_P, ends)],
        "replicas_used": [float(block.mean()) for block in blocks["replicas_used"]],
        "learnt_steps_by_block": [float(block.sum()) for block in blocks["learnt_steps"]],
        **{name: told[name] for name in ("learnt_steps", "learnt_late", "learnt_frac")},
    }
