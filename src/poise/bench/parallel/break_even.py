"""Where balancing each step begins to pay: static beside PROBE by imbalance, by tokens, and where there is nothing to gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.bench.cluster.layout import ClusterLayout, two_ranks
from poise.bench.parallel.case import Case, equal_ranks, prefill_job, write_rows
from poise.bench.parallel.contest import PROBE, STATIC, contest
from poise.bench.parallel.probe_passes import Passes, Uneven, contested, with_engines
from poise.bench.parallel.session import Session

KNOWN = 6
"""Passes after which costs are known."""
TOKENS = (16, 64, 256)
IMBALANCES = (1.1, 1.2, 1.3, 1.4, 1.5)
OVERHEAD_ROWS, OVERHEAD_TOKENS, OVERHEAD_ROUNDS = (4, 16), 64, 4
"""Prompts of each rank in a pass, and tokens of each: few enough to come in whole."""


def by_imbalance(
    passes: Passes, case: Case, layout: ClusterLayout, imbalances: Sequence[float] = IMBALANCES
) -> dict[str, Any]:
    """The same passes over code from all over the text, by how experts are laid out for those of them that count."""
    ranks, rows = len(layout.ranks), []
    code_WT = case.rows["code"]
    count = ranks * (KNOWN + passes.steps)
    spread_WT = code_WT[np.linspace(0, len(code_WT) - 1, count).astype(int)]
    with Session(layout) as session:
        job = prefill_job(case, write_rows(passes.scratch / "break-even.json", spread_WT), rows_per_rank=1)
        for imbalance in imbalances:
            lies = Uneven(rows_WT=spread_WT[ranks * KNOWN :], imbalance=imbalance)
            placed = job | passes.laid_out(session, case, lies)
            facts = contest(session, placed, STATIC | PROBE, passes.scratch, warm_up=KNOWN)
            rows.append({"imbalance": imbalance, **contested(case, session, "prefill", code_WT.shape[1], facts)})
    return {"rows": rows}


def by_tokens(passes: Passes, case: Case) -> dict[str, Any]:
    """From few tokens, for which experts are hardly more than the reading of their weights, to many."""
    layout, rows = with_engines(equal_ranks()), []
    for tokens in TOKENS:
        part = passes.prefill(case, layout, case.rows["code"][:, :tokens], STATIC | PROBE, warm_up=KNOWN)
        rows.append({"tokens": tokens, **part})
    return {"rows": rows}


def overhead(passes: Passes, case: Case) -> dict[str, Any]:
    """``case``: of even popularity, so what balancing costs is seen, in short passes and in long ones."""
    rows_WT = case.rows["measured"].reshape(-1, OVERHEAD_TOKENS)
    rows = [
        passes.prefill(
            case,
            two_ranks(),
            rows_WT,
            STATIC | PROBE,
            rows_per_rank=count,
            rounds=OVERHEAD_ROUNDS,
            warm_up=KNOWN,
        )
        for count in OVERHEAD_ROWS
    ]
    return {"rows": rows}
