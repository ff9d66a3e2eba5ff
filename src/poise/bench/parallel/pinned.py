"""Policies side by side on a machine with many cores: ranks are pinned to real ones that nobody shares, without quotas.

Neither root nor control groups are needed. Ranks talk over loopback, and one thread of each computes; where a rank has several
cores, the others are there for the threads that move experts and look ahead, so these count as copy engines. A part is named by
ranks x cores of each, kind of passes, and tokens of each rank in one: ``8x2:prefill:256``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from poise.bench.cluster.layout import pinned_ranks
from poise.bench.parallel.case import Case, beginnings, cycled, prefill_job, write_rows
from poise.bench.parallel.contest import AHEAD, MOVERS, ORACLE, PROBE, STATIC, WARM_UP, Contenders, contest
from poise.bench.parallel.session import Session
from poise.errors import UsageError

PARTS = ("8x2:prefill:256", "8x2:decode:128", "8x2:prefill:1024", "4x4:prefill:1024")
KIND = "code"
DECODE_PROMPT = 8
"""Tokens that decoded sequences begin with."""
CONTENDERS: Contenders = STATIC | {"eplb": MOVERS["eplb"]} | PROBE | ORACLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """``kind``: "prefill" of ``tokens`` of each rank in a pass, or "decode" of as many sequences."""

    ranks: int
    cores: int
    kind: str
    tokens: int

    @classmethod
    def named(cls, name: str) -> Self:
        """Raises UsageError if the name is none of a part."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*):(prefill|decode):([1-9]\d*)", name)
        if found is None:
            raise UsageError(
                f"part {name!r} is no RANKSxCORES:KIND:TOKENS; KIND is prefill or decode, as in {PARTS[0]}"
            )
        ranks, cores, kind, tokens = found.groups()
        return cls(ranks=int(ranks), cores=int(cores), kind=kind, tokens=int(tokens))


def measure(
    part: Part,
    case: Case,
    scratch: Path,
    *,
    steps: int,
    rounds: int = 2,
    warm_up: int = WARM_UP,
    until_s: float | None = None,
) -> dict[str, Any]:
    """Facts of each contender in ``steps`` passes of each round. ``until_s``: as in ``contest``.

    Raises PoiseError where there are too few cores, or when a rank fails.
    """
    job = _prefill(part, case, scratch, warm_up + steps) if part.kind == "prefill" else _decode(part, case, scratch)
    behind_tokens = None
    if part.kind == "decode":
        job["new_tokens"] = warm_up + steps
        behind_tokens = warm_up * part.tokens * part.ranks
    with Session(pinned_ranks(part.ranks, part.cores)) as session:
        policies = contest(
            session,
            {**job, "device": "cpu", "copy_engines": part.cores > 1},
            CONTENDERS if part.cores == 1 else CONTENDERS | {"probe, inline": AHEAD["inline"]},
            scratch,
            rounds=rounds,
            warm_up=warm_up,
            behind_tokens=behind_tokens,
            steps=steps,
            until_s=until_s,
        )
        return {
            "model": case.name,
            "pass": part.kind,
            "tokens_per_rank": part.tokens,
            "layout": session.layout.name,
            "limits_enforced": list(session.enforced),
            "policies": policies,
        }


def _prefill(part: Part, case: Case, scratch: Path, passes: int) -> dict[str, Any]:
    """New rows in every pass: of the case's length, or shorter where a rank has fewer tokens."""
    rows_WT = case.rows[KIND]
    rows_per_rank = -(-part.tokens // rows_WT.shape[1])
    if part.tokens % rows_per_rank:
        raise UsageError(f"{part.tokens} tokens a rank are not {rows_per_rank} like rows; give a multiple")
    rows_WT = rows_WT[:, : part.tokens // rows_per_rank]
    prompts = write_rows(scratch / "prompts.json", cycled(rows_WT, rows_per_rank * part.ranks * passes))
    return prefill_job(case, prompts, rows_per_rank=rows_per_rank)


def _decode(part: Part, case: Case, scratch: Path) -> dict[str, Any]:
    """Sequences that begin with a few tokens from all over the text."""
    begun_WT = beginnings(case.rows[KIND], part.tokens * part.ranks, DECODE_PROMPT)
    return prefill_job(case, write_rows(scratch / "prompts.json", begun_WT), rows_per_rank=part.tokens)
