"""Whether text depends on ranks or policy: greedy tokens of every policy on 1, 2 and 4 ranks against one process, in fp32.

Windows are short, so that experts move many times in the middle of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poise.bench.parallel.case import DTYPE, MEMORY, Case, one_rank, shared_ranks, write_rows
from poise.bench.parallel.session import Session

RANKS = (1, 2, 4)
POLICIES = ("static", "eplb", "vibe")
PROMPTS = 12
NEW_TOKENS = 40
INTERVAL = 8


def measure(cases: Sequence[Case], directory: Path) -> dict[str, Any]:
    """For each model: tokens compared, tokens that differ, moves on the way."""
    jobs = {case.name: _job(case, directory) for case in cases}
    with Session(one_rank()) as session:
        wanted = {name: session.run({**job, "balance": "reference"}).facts["tokens"] for name, job in jobs.items()}
    rows = []
    for ranks in RANKS:
        with Session(shared_ranks(ranks)) as session:
            for name, job in jobs.items():
                for balance in POLICIES if ranks > 1 else POLICIES[:1]:
                    policy = {} if balance == "static" else {"policy": {"interval": INTERVAL}}
                    facts = session.run({**job, "balance": balance, **policy}).facts
                    rows.append({"model": name, "ranks": ranks, "policy": balance, **_compared(facts, wanted[name])})
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
    }
