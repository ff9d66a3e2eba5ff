"""`poise bench place`: predicted time over the bound, planning time, and moves after drift, beside the token balancers.

Both token balancers, DeepSeek's EPLB and vLLM's default policy, place alike; vLLM's own code runs where it is installed, else
our EPLB stands for it, and the result says so. The judge is the planner's cost model, for all: see ``plan.placement``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from poise.bench.machine import stamp
from poise.bench.place.cases import DRIFT_SIGMA, MACHINES, MODELS, PHASES, Case, Floats, case_of, cases, drifted
from poise.bench.place.contenders import balance, plan, vllm_policy
from poise.bench.place.drift import MOVED, SLOWED_FRAC, TRADED, drift_of, drift_table, trade_table, trades_of
from poise.bench.results import document, write_result
from poise.plan.anew import shared_copies_L
from poise.plan.placement import predict_s_LR
from poise.plan.rank_costs import Ints

NAME = "place"
REPEATS = 9
TIMED = ((0, 8), (0, 32), (0, 64), (1, 8), (1, 64), (2, 32))
"""(model, ranks) whose planning is timed; the second is the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Times over the bound, summed over layers. ``gain_frac``: less time than the token balancer, 0 to 1; ``gain_limit_frac``:
    the most that knowing the speeds can gain over perfectly even tokens, 1 - min(s) / mean(s). ``shared_copies``: slots, of all
    layers, whose rank has the expert in another slot."""

    model: str
    layers: int
    experts: int
    ranks: int
    machine: str
    load: str
    phase: str
    over_bound: float
    worst_over_bound: float
    balancer_over_bound: float
    shared_copies: int
    balancer_shared_copies: int
    gain_frac: float
    gain_limit_frac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median seconds of planning all layers, in one process, taking turns. ``repair_s``: from a current placement."""

    name: str
    poise_s: float
    repair_s: float
    eplb_s: float
    vllm_s: float | None


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench place`."""
    vllm = vllm_policy()
    recorded_LE = _recorded_load()
    todo = list(cases(recorded_LE))
    plan(todo[0])  # compiles
    qualities = [quality_of(one) for one in track(todo, "Placing", console=Console(stderr=True), transient=True)]
    timings = [timing_of(MODELS[model], ranks, vllm) for model, ranks in TIMED]
    drifts = [drift_of(MODELS[model], ranks) for model, ranks in MOVED]
    trades = [one for model, ranks in TRADED for one in trades_of(MODELS[model], ranks)]
    facts = stamp()
    results: dict[str, object] = {
        "vllm_policy": "vLLM's own" if vllm else "not installed; our EPLB, which places alike, stands for it",
        "slots": "experts per rank + 1",
        "tokens_per_rank": PHASES,
        "drift_sigma": DRIFT_SIGMA,
        "slowed_frac": SLOWED_FRAC,
        "quality": [asdict(one) for one in qualities],
        "timing": [asdict(one) for one in timings],
        "drift": [asdict(one) for one in drifts],
        "moves_traded_for_time": [asdict(one) for one in trades],
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        for table in (_quality_table(qualities), _timing_table(timings), drift_table(drifts), trade_table(trades)):
            Console().print(table)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def quality_of(case: Case) -> Quality:
    """Both placements of a case, judged alike."""
    found = plan(case)
    balanced_LS = balance(case, case.load_LE)
    balanced_s_L = predict_s_LR(case.load_LE, balanced_LS, case.costs).max(axis=1)
    bound_s, predicted_s = found.bound_s_L.sum(), found.predicted_s_L.sum()
    speed_R = case.costs.speed_R
    return Quality(
        model=case.model.name,
        layers=case.model.layers,
        experts=case.model.experts,
        ranks=case.num_ranks,
        machine=case.machine,
        load=case.load,
        phase=case.phase,
        over_bound=float(predicted_s / bound_s),
        worst_over_bound=float((found.predicted_s_L / found.bound_s_L).max()),
        balancer_over_bound=float(balanced_s_L.sum() / bound_s),
        shared_copies=int(shared_copies_L(found.slot_to_expert_LS, case.num_ranks).sum()),
        balancer_shared_copies=int(shared_copies_L(balanced_LS, case.num_ranks).sum()),
        gain_frac=float(1.0 - predicted_s / balanced_s_L.sum()),
        gain_limit_frac=float(1.0 - speed_R.min() / speed_R.mean()),
    )


def timing_of(model: Any, ranks: int, vllm: Callable[[Floats, int, int], Ints] | None) -> Timing:
    """Planning for lognormal loads on devices with a spread of 22 %, the contenders taking turns."""
    case = case_of(model, ranks, "spread-22", "lognormal", "prefill")
    current_LS, after_LE = plan(case).slot_to_expert_LS, drifted(case.load_LE)
    slots = ranks * case.slots_per_rank
    contenders: dict[str, Callable[[], object]] = {
        "poise": lambda: plan(case),
        "repair": lambda: plan(case, load_LE=after_LE, current_LS=current_LS),
        "eplb": lambda: balance(case, case.load_LE),
    }
    if vllm is not None:
        same = (vllm(case.load_LE, slots, ranks) == balance(case, case.load_LE.astype(np.float32))).all()
        assert same, "vLLM's policy and our EPLB are the same algorithm"
        contenders["vllm"] = lambda: vllm(case.load_LE, slots, ranks)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEATS):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return Timing(
        name=case.name,
        poise_s=medians["poise"],
        repair_s=medians["repair"],
        eplb_s=medians["eplb"],
        vllm_s=medians.get("vllm"),
    )


def _recorded_load() -> Floats:
    """Tokens of each expert of the bundled model over recorded text, half code and half prose."""
    from poise.bench.routed_text import EXPERTS, route_text

    recorded, _ = route_text()
    by_layer = recorded.chosen_WLTK.transpose(1, 0, 2, 3).reshape(recorded.chosen_WLTK.shape[1], -1)
    return np.stack([np.bincount(chosen, minlength=EXPERTS) for chosen in by_layer]).astype(float)


def _quality_table(qualities: Sequence[Quality]) -> Table:
    title = "Time over the bound, mean over loads; in brackets: less time than the token balancer"
    table = Table("layers x experts", "phase", "ranks", *MACHINES, title=title, title_justify="left")
    rows: dict[tuple[str, str, int], dict[str, list[Quality]]] = {}
    for one in qualities:
        cells = rows.setdefault((f"{one.layers} x {one.experts}", one.phase, one.ranks), {})
        cells.setdefault(one.machine, []).append(one)
    for (model, phase, ranks), cells in rows.items():
        over = [np.mean([one.over_bound for one in cells[machine]]) for machine in MACHINES]
        gain = [np.mean([one.gain_frac for one in cells[machine]]) for machine in MACHINES]
        shown = (f"{one:.4f} ({other:.1%})" for one, other in zip(over, gain, strict=True))
        table.add_row(model, phase, str(ranks), *shown)
    limits = {one.machine: one.gain_limit_frac for one in qualities if one.ranks >= 8}
    table.add_section()
    table.add_row("most that speeds gain", "", "", *(f"({limits[machine]:.1%})" for machine in MACHINES))
    return table


def _timing_table(timings: Sequence[Timing]) -> Table:
    title = "Planning, ms (lognormal loads, spread of 22 %)"
    table = Table("layers x experts", "Poise", "repair", "our EPLB", "vLLM", title=title, title_justify="left")
    for one in timings:
        vllm = "-" if one.vllm_s is None else f"{one.vllm_s * 1e3:.1f}"
        table.add_row(
            one.name.rsplit(", ", 3)[0], *(f"{s * 1e3:.1f}" for s in (one.poise_s, one.repair_s, one.eplb_s)), vllm
        )
    return table
