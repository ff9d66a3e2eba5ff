"""Whether text depends on ranks or policy: greedy tokens of every policy on 1, 2 and 4 ranks against one process, in fp32.

Windows are short, so that experts move in the middle of texts. ViBE seldom finds a move that pays here, so it also runs in a
way in which any gain is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.bench.parallel.case import DTYPE, MEMORY, Case, one_rank, shared_ranks, write_rows
from poise.bench.parallel.session import Session

RANKS = (1, 2, 4)
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "static": {"balance": "static"},
    "eplb": {"balance": "eplb", "policy": {"interval": 8}},
    "vibe": {"balance": "vibe", "policy": {"interval": 8}},
    "vibe that moves": {
        "balance": "vibe",
        "policy": {"interval": 1, "least_gain_frac": -1.0, "payback_steps": 1_000_000},
    },
    "probe": {"balance": "probe"},
    "probe+vibe": {"balance": "probe+vibe", "policy": {"interval": 8}},
}
"""What of a job."""
PROMPTS = 12
NEW_TOKENS = 40


def measure(cases: Sequence[Case], directory: Path) -> dict[str, Any]:
    """For each model: tokens compared, tokens that differ, moves and replicas on the way."""
    jobs = {case.name: _job(case, directory) for case in cases}
    with Session(one_rank()) as session:
        wanted = {name: session.run({**job, "balance": "reference"}).facts["tokens"] for name, job in jobs.items()}
    rows = []
    for ranks in RANKS:
        with Session(shared_ranks(ranks)) as session:
            for name, job in jobs.items():
                for policy, of_job in POLICIES.items():
                    facts = session.run({**job, **of_job}).facts
                    rows.append({"model": name, "ranks": ranks, "policy": policy, **_compared(facts, wanted[name])})
    return {"dtype": DTYPE, "rows": rows}


def _job(case: Case, directory: Path) -> dict[str, Any]:
    """Prompts of 20 to 240 tokens, some of each kind."""
    kinds = list(case.rows.values())
    prompts = [kinds[index % len(kinds)][index, : 20 * (index + 1)].tolist() for index in range(PROMPTS)]
    file = write_rows(directory / f"{case.model.name}-exactness.json", prompts)
    return {"model": str(case.model), "memory": MEMORY, "dtype": DTYPE, "prompts": file, "new_tokens": NEW_TOKENS}


def _compared(facts: dict[str, Any], wanted: list[list[int]]) -> dict[str, Any]:
    pairs = [
        (one, other)
        for mine, theirs in zip(facts["tokens"], wanted, strict=True)
        for one, other in zip(mine, theirs, strict=True)
    ]
    return {
        "tokens": len(pairs),
        "different": sum(one != other for one, other in pairs),
        "moves": sum(each["moved_experts"] for each in facts["history"]),
        "replicas": 0 if facts["balanced"] is None else round(facts["balanced"]["replicas_used"]),
    }
