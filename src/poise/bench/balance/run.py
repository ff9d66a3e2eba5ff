"""`poise bench balance`: how long a plan takes and how near it comes to what cannot be beaten, beside the paper's search.

The judge is the planner's cost model, for all. Times are of one core, warm, with the Python call, taking turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from poise.bench.balance.optimum import GAP_FRAC, optimum_s, small_cases
from poise.bench.balance.steps import MODELS, PHASES, RANK_SIGMA, SKEWS, WINDOW_FACTOR, Case, Model, case_of, imbalance
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.plan.balance import MOST_WORK, BalancePlan
from poise.plan.balance_assignment import dispatch_of
from poise.plan.balance_bound import step_bound_s

NAME = "balance"
MACHINES = ("h200", "spread-22")
SLOTS = (0, 1, 2, 3, 4)
STEPS = 12
TIMED_STEPS, TIMED_ROUNDS = 40, 25
SEEDS = 6
EFFORTS = (MOST_WORK, 4000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Means over steps. Times over the bound of the given slots and windows; ``free_bound``: the bound with neither limit, over
    that. ``imbalance``: most tokens of a rank over the mean, before and after."""

    model: str
    ranks: int
    machine: str
    phase: str
    skew: float
    slots: int
    gives: int
    static: float
    greedy: float
    ours: float
    worst_ours: float
    free_bound: float
    imbalance_before: float
    imbalance_after: float
    replicas: float
    declined_frac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds, median and 99th percentile: replicas and assignment from counts; the same with where a rank's tokens go; the
    greedy search; dividing true tokens."""

    model: str
    ranks: int
    phase: str
    skew: float
    plan_s: tuple[float, float]
    plan_dispatch_s: tuple[float, float]
    greedy_s: tuple[float, float]
    divide_s: tuple[float, float]
    removed_frac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact:
    """Times over the optimum of the integer program, small cases."""

    planner: str
    cases: int
    median: float
    mean: float
    p90: float
    worst: float
    within_2_percent_frac: float


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench balance`."""
    console = Console(stderr=True)
    timings = [
        timing_of(case_of(model, "h200", phase, skew, steps=TIMED_STEPS))
        for model in MODELS
        for phase in PHASES
        for skew in track(SKEWS, f"Timing {model.name}, {phase}", console=console, transient=True)
    ]
    kinds = [
        (model, machine, phase, skew) for model in MODELS for machine in MACHINES for phase in PHASES for skew in SKEWS
    ]
    qualities = [
        one for kind in track(kinds, "Planning", console=console, transient=True) for one in qualities_of(*kind)
    ]
    exacts = exacts_of(console)
    facts = stamp()
    results: dict[str, object] = {
        "tokens_per_rank": PHASES,
        "rank_sigma": RANK_SIGMA,
        "window_factor": WINDOW_FACTOR,
        "optimum_gap_frac": GAP_FRAC,
        "timing": [asdict(one) for one in timings],
        "quality": [asdict(one) for one in qualities],
        "exact": [asdict(one) for one in exacts],
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        for table in (_timing_table(timings), _quality_table(qualities), _exact_table(exacts)):
            Console().print(table)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def timing_of(case: Case) -> Timing:
    """Three replica slots; contenders in turn on the same steps."""
    ours, greedy = case.balancer("quota"), case.balancer("greedy")
    window_s_R = np.full(case.model.ranks, case.window_s)
    spent: list[tuple[float, ...]] = []
    removed: list[float] = []
    for round_ in range(TIMED_ROUNDS + 1):  # the first compiles and warms
        for counts_RE in case.steps:
            marks = [time.perf_counter()]
            plan = ours.choose_replicas(counts_RE, window_s_R)
            marks.append(time.perf_counter())
            dispatch_of(plan.assignment, counts_RE, 0)
            marks.append(time.perf_counter())
            greedy.choose_replicas(counts_RE, window_s_R)
            marks.append(time.perf_counter())
            ours.divide(counts_RE, plan.replica_N3)
            marks.append(time.perf_counter())
            if round_:
                spent.append(tuple(np.diff(marks)))
                removed.append(_removed_frac(counts_RE, plan))
    times = np.array(spent)

    def both(column_N: np.ndarray) -> tuple[float, float]:
        return float(np.median(column_N)), float(np.quantile(column_N, 0.99))

    return Timing(
        model=case.model.name,
        ranks=case.model.ranks,
        phase=case.phase,
        skew=case.skew,
        plan_s=both(times[:, 0]),
        plan_dispatch_s=both(times[:, 0] + times[:, 1]),
        greedy_s=both(times[:, 2]),
        divide_s=both(times[:, 3]),
        removed_frac=float(np.mean(removed)),
    )


def qualities_of(model: Model, machine: str, phase: str, skew: float) -> list[Quality]:
    """One for each number of replica slots."""
    case = case_of(model, machine, phase, skew, steps=STEPS)
    window_s_R = np.full(model.ranks, case.window_s)
    free_s = [_bound_s(case, counts_RE, model.experts, model.experts * model.ranks) for counts_RE in case.steps]
    qualities = []
    for slots in SLOTS:
        ours, greedy = (case.balancer(strategy, replica_slots=slots) for strategy in ("quota", "greedy"))
        bounds = [_bound_s(case, counts_RE, slots, case.gives) for counts_RE in case.steps]
        plans = [ours.choose_replicas(counts_RE, window_s_R) for counts_RE in case.steps]
        greedies = [greedy.choose_replicas(counts_RE, window_s_R).predicted_s for counts_RE in case.steps]
        over = [plan.predicted_s / bound for plan, bound in zip(plans, bounds, strict=True)]
        tokens_NR = [plan.assignment.tokens_ER(model.ranks).sum(axis=0) for plan in plans]
        qualities.append(
            Quality(
                model=model.name,
                ranks=model.ranks,
                machine=machine,
                phase=phase,
                skew=skew,
                slots=slots,
                gives=case.gives,
                static=float(np.mean([plan.unbalanced_s / b for plan, b in zip(plans, bounds, strict=True)])),
                greedy=float(np.mean(np.array(greedies) / bounds)),
                ours=float(np.mean(over)),
                worst_ours=float(max(over)),
                free_bound=float(np.mean(np.array(free_s) / bounds)),
                imbalance_before=float(np.mean([imbalance(counts_RE) for counts_RE in case.steps])),
                imbalance_after=float(np.mean([tokens_R.max() / tokens_R.mean() for tokens_R in tokens_NR])),
                replicas=float(np.mean([len(plan.replica_N3) for plan in plans])),
                declined_frac=ours.declined / ours.planned,
            )
        )
    return qualities


def exacts_of(console: Console) -> list[Exact]:
    """Ours, with more effort, and the greedy search over the exact optimum."""
    cases = small_cases(seeds=SEEDS)
    optima = [optimum_s(case) for case in track(cases, "Solving exactly", console=console, transient=True)]
    plans = {"greedy": [case.plan_s("greedy") for case in cases]}
    for effort in EFFORTS:
        plans[f"ours, most_work {effort}"] = [case.plan_s("quota", most_work=effort) for case in cases]
    return [_exact(name, np.array(plan_s) / optima) for name, plan_s in plans.items()]


def _exact(name: str, over_N: np.ndarray) -> Exact:
    return Exact(
        planner=name,
        cases=len(over_N),
        median=float(np.median(over_N)),
        mean=float(over_N.mean()),
        p90=float(np.quantile(over_N, 0.9)),
        worst=float(over_N.max()),
        within_2_percent_frac=float((over_N <= 1.02).mean()),
    )


def _bound_s(case: Case, counts_RE: np.ndarray, slots: int, gives: int) -> float:
    ranks = case.model.ranks
    return step_bound_s(
        counts_RE,
        np.arange(case.model.experts),
        case.costs,
        token_s_R=np.full(ranks, 2.0 * case.model.token_bytes / case.link_bytes_per_s),
        slots_R=np.full(ranks, min(slots, gives)),
        gives_R=np.full(ranks, gives if slots else 0),
    )


def _removed_frac(counts_RE: np.ndarray, plan: BalancePlan) -> float:
    """Of the imbalance above 1."""
    tokens_R = plan.assignment.tokens_ER(len(counts_RE)).sum(axis=0)
    before, after = imbalance(counts_RE), float(tokens_R.max() / tokens_R.mean())
    return (before - after) / (before - 1.0)


def _timing_table(timings: Sequence[Timing]) -> Table:
    title = "Microseconds, median / 99th percentile (h200, 3 replica slots)"
    table = Table("experts x ranks", "phase", "skew", title=title, title_justify="left")
    for column in ("plan", "plan and dispatch", "greedy", "divide", "imbalance removed"):
        table.add_column(column, justify="right")
    for one in timings:
        pairs = (one.plan_s, one.plan_dispatch_s, one.greedy_s, one.divide_s)
        shown = (f"{median * 1e6:.0f} / {p99 * 1e6:.0f}" for median, p99 in pairs)
        table.add_row(f"{one.model}, {one.ranks}", one.phase, f"{one.skew}", *shown, f"{one.removed_frac:.0%}")
    return table


def _quality_table(qualities: Sequence[Quality]) -> Table:
    title = "Time over the bound: static / greedy / ours; in brackets: the bound without slots and windows"
    table = Table("experts x ranks", "machine", "phase", "skew", title=title, title_justify="left")
    for slots in SLOTS:
        table.add_column(f"{slots} slots", justify="right")
    rows: dict[tuple[str, str, str, float], list[str]] = {}
    for one in qualities:
        shown = f"{one.static:.2f} / {one.greedy:.2f} / {one.ours:.3f} ({one.free_bound:.2f})"
        rows.setdefault((f"{one.model}, {one.ranks}", one.machine, one.phase, one.skew), []).append(shown)
    for (model, machine, phase, skew), cells in rows.items():
        table.add_row(model, machine, phase, f"{skew}", *cells)
    return table


def _exact_table(exacts: Sequence[Exact]) -> Table:
    table = Table("planner", title="Time over the exact optimum, 3 and 4 ranks", title_justify="left")
    for column in ("cases", "median", "mean", "90 %", "worst", "within 2 %"):
        table.add_column(column, justify="right")
    for one in exacts:
        figures = (f"{figure:.3f}" for figure in (one.median, one.mean, one.p90, one.worst))
        table.add_row(one.planner, str(one.cases), *figures, f"{one.within_2_percent_frac:.0%}")
    return table
