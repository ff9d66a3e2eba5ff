"""Contests of prefill and of decode passes on a cluster in a box, as the parts of the probe suite ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from poise.bench.cgroup import period_s
from poise.bench.cluster.layout import GBIT_PER_S, ClusterLayout
from poise.bench.parallel.case import (
    Case,
    Ints,
    beginnings,
    bundled_case,
    cycled,
    equal_ranks,
    prefill_job,
    write_rows,
)
from poise.bench.parallel.contest import MOVERS, ORACLE, PROBE, ROUNDS, STATIC, WARM_UP, Contenders, contest
from poise.bench.parallel.distilled import distilled
from poise.bench.parallel.session import Session
from poise.bench.parallel.shapes import shape_of
from poise.bench.parallel.uneven import uneven

MIXED = "code and prose"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Sequences that are decoded together: what they begin with, as many on each rank, and ``tokens`` of each."""

    rows_WT: Ints
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Uneven:
    """Experts lie so that one rank of each layer has ``imbalance`` times the mean of what ``rows_WT`` bring, a row of each rank
    in a pass."""

    rows_WT: Ints
    imbalance: float


class Passes:
    """``directory``: of models; ``scratch``: for prompts; ``steps``: passes that count."""

    def __init__(self, directory: Path, scratch: Path, steps: int) -> None:
        self.directory, self.scratch, self.steps = directory, scratch, steps

    def all_of(self, case: Case) -> Contenders:
        """Static, both that move experts, PROBE by frozen gates and distilled, and the oracle."""
        return STATIC | MOVERS | PROBE | self.distilled(case, "probe, distilled") | ORACLE

    def distilled(self, case: Case, name: str) -> Contenders:
        """PROBE with trained predictors."""
        trained = distilled(self.directory, bundled_case(self.directory), case)
        return {name: {"balance": "probe", "steps": {"lookahead": str(trained)}}}

    def prefill(
        self,
        case: Case,
        layout: ClusterLayout,
        rows_WT: Ints,
        contenders: Contenders,
        *,
        rows_per_rank: int = 1,
        warm_up: int = WARM_UP,
        rounds: int = ROUNDS,
        lies: Uneven | None = None,
    ) -> dict[str, Any]:
        """Passes over new prompts. ``lies``: where experts do; None: in their order."""
        with Session(layout) as session:
            job = {} if lies is None else self.laid_out(session, case, lies)
            count = rows_per_rank * len(layout.ranks) * (self.steps + warm_up)
            prompts = write_rows(self.scratch / "prefill.json", cycled(rows_WT, count))
            job |= prefill_job(case, prompts, rows_per_rank=rows_per_rank)
            facts = contest(session, job, contenders, self.scratch, rounds=rounds, warm_up=warm_up)
            return contested(case, session, "prefill", rows_per_rank * rows_WT.shape[1], facts)

    def decode(
        self,
        case: Case,
        layout: ClusterLayout,
        stretches: Sequence[Stretch],
        contenders: Contenders,
        *,
        behind: int,
        learnt: int | None = None,
        lately: int | None = None,
        steps: int | None = None,
        decode_alone: bool = False,
        rounds: int = ROUNDS,
        lies: Uneven | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Stretch after stretch. Passes count behind the one in which sequences have got ``behind`` tokens, those of all
        stretches together; ``learnt``: how many of them placements are made from, None: as many. ``steps``: in place of this
        object's; ``lately`` and ``decode_alone``: as in ``contest``; ``more``: of the job; ``lies``: as in
        ``prefill``."""
        ranks, per_stretch = len(layout.ranks), len(stretches[0].rows_WT)
        prompts = write_rows(self.scratch / "decode.json", np.concatenate([each.rows_WT for each in stretches]))
        new_tokens = np.repeat([each.tokens for each in stretches], per_stretch).tolist()
        with Session(layout) as session:
            job = {} if lies is None else self.laid_out(session, case, lies)
            job |= prefill_job(case, prompts, rows_per_rank=per_stretch // ranks)
            facts = contest(
                session,
                {**job, "new_tokens": new_tokens, **more},
                contenders,
                self.scratch,
                rounds=rounds,
                behind_tokens=behind * per_stretch,
                learnt_tokens=None if learnt is None else learnt * per_stretch,
                lately=lately,
                steps=steps or self.steps,
                decode_alone=decode_alone,
            )
            return contested(case, session, "decode", per_stretch // ranks, facts)

    def laid_out(self, session: Session, case: Case, lies: Uneven) -> dict[str, Any]:
        """Of a job: the placement."""
        prompts = write_rows(self.scratch / "profile.json", lies.rows_WT)
        seen = session.run(prefill_job(case, prompts, rows_per_rank=1, keeps_records=True))
        assert seen.load_PLE is not None, "the job keeps records"
        load_LE, ranks = seen.load_PLE.sum(axis=0), len(session.layout.ranks)
        return {"placement": uneven(load_LE, ranks=ranks, imbalance=lies.imbalance).to_json()}


def about(case: Case, session: Session, kind: str, tokens: int) -> dict[str, Any]:
    """What ran, under which limits."""
    return {
        "model": case.name,
        "pass": kind,
        "tokens_per_rank": tokens,
        "layout": session.layout.name,
        "shares": [limits.cores for limits in session.layout.ranks],
        "limits_enforced": list(session.enforced),
        "limits_missing": list(session.missing),
    }


def contested(case: Case, session: Session, kind: str, tokens: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Beside that, ``facts`` of contenders. ``layer_periods``: of ranks' quotas in a layer of the first contender's steps;
    None where ranks have none."""
    periods_s = [period_s(limits.cores) for limits in session.layout.ranks if limits.cores is not None]
    layer_s = next(iter(facts.values()))["step_s"] / shape_of(case.model).layers
    return about(case, session, kind, tokens) | {
        "layer_periods": layer_s / max(periods_s) if periods_s else None,
        "policies": facts,
    }


def linked() -> ClusterLayout:
    """Four like ranks behind links of 1 Gbit/s, which replicas and tokens must share."""
    return with_engines(equal_ranks()).with_link(GBIT_PER_S)


def with_engines(layout: ClusterLayout) -> ClusterLayout:
    """Threads that move experts run beside the shares."""
    return replace(layout, copy_engines=True)


def begun(case: Case, kind: str, count: int, tokens: int) -> Ints:
    """``count`` stretches of so many tokens, from all over the rows; ``MIXED``: half of them code, half prose, on each rank."""
    if kind == MIXED:
        return np.concatenate([begun(case, each, count // 2, tokens) for each in ("code", "prose")])
    return beginnings(case.rows[kind], count, tokens)


def mixed(case: Case) -> Ints:
    """Code and prose in turn, so that no two passes are alike."""
    code, prose = case.rows["code"], case.rows["prose"]
    count = min(len(code), len(prose))
    return np.stack([code[:count], prose[:count]], axis=1).reshape(-1, code.shape[1])
