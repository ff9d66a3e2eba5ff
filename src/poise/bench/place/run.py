"""`poise bench place`: predicted time over the bound, planning time, and moves after drift, beside the token balancers.

Both token balancers, DeepSeek's EPLB and vLLM's default policy, place alike; vLLM's own code runs where it is installed, else
our EPLB stands for it, and the result says so. The judge is the planner's cost model, for all: see ``plan.placement``.
"""

from __future__ import annotations

import importlib
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
from poise.bench.results import document, write_result
from poise.plan.eplb import balance_tokens
from poise.plan.moves import keep_slots, moves_between
from poise.plan.placement import PlacementPlan, place_on, predict_s_LR
from poise.plan.placement_request import PlacementRequest
from poise.plan.rank_costs import Ints

NAME = "place"
REPEATS = 9
TIMED = ((0, 8), (0, 32), (0, 64), (1, 8), (1, 64), (2, 32))
"""(model, ranks) whose planning is timed; the second is the target."""
MOVED = ((0, 8), (0, 32), (1, 8), (2, 8))
SLOWED_FRAC = 0.1
"""With drift, the first rank also becomes slower by this share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Times over the bound, summed over layers. ``gain_frac``: less time than the token balancer, 0 to 1; ``gain_limit_frac``:
    the most that knowing the speeds can gain over perfectly even tokens, 1 - min(s) / mean(s)."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """After drift: moves a layer (experts that come to another rank), and times over that of a new placement."""

    name: str
    stale_over_new: float
    repaired_over_new: float
    limited_over_new: float
    balancer_over_new: float
    repair_moves: float
    limited_moves: float
    new_moves: float
    balancer_moves: float
    slots: int


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench place`."""
    vllm = _vllm_policy()
    recorded_LE = _recorded_load()
    todo = list(cases(recorded_LE))
    _plan(todo[0])  # compiles
    qualities = [quality_of(one) for one in track(todo, "Placing", console=Console(stderr=True), transient=True)]
    timings = [timing_of(MODELS[model], ranks, vllm) for model, ranks in TIMED]
    drifts = [drift_of(MODELS[model], ranks) for model, ranks in MOVED]
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
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        for table in (_quality_table(qualities), _timing_table(timings), _drift_table(drifts)):
            Console().print(table)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def quality_of(case: Case) -> Quality:
    """Both placements of a case, judged alike."""
    plan = _plan(case)
    balanced_s_L = predict_s_LR(case.load_LE, _balance(case, case.load_LE), case.costs).max(axis=1)
    bound_s, predicted_s = plan.bound_s_L.sum(), plan.predicted_s_L.sum()
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
        worst_over_bound=float((plan.predicted_s_L / plan.bound_s_L).max()),
        balancer_over_bound=float(balanced_s_L.sum() / bound_s),
        gain_frac=float(1.0 - predicted_s / balanced_s_L.sum()),
        gain_limit_frac=float(1.0 - speed_R.min() / speed_R.mean()),
    )


def timing_of(model: Any, ranks: int, vllm: Callable[[Floats, int, int], Ints] | None) -> Timing:
    """Planning for lognormal loads on devices with a spread of 22 %, the contenders taking turns."""
    case = case_of(model, ranks, "spread-22", "lognormal", "prefill")
    current_LS, after_LE = _plan(case).slot_to_expert_LS, drifted(case.load_LE)
    slots = ranks * case.slots_per_rank
    contenders: dict[str, Callable[[], object]] = {
        "poise": lambda: _plan(case),
        "repair": lambda: _plan(case, load_LE=after_LE, current_LS=current_LS),
        "eplb": lambda: _balance(case, case.load_LE),
    }
    if vllm is not None:
        same = (vllm(case.load_LE, slots, ranks) == _balance(case, case.load_LE.astype(np.float32))).all()
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


def drift_of(model: Any, ranks: int) -> Drift:
    """Loads drift and the first rank slows down: what each way of going on costs in moves, and what it leaves."""
    case = case_of(model, ranks, "spread-7", "lognormal", "prefill")
    speed_R = case.costs.speed_R * np.where(np.arange(ranks) == 0, 1.0 - SLOWED_FRAC, 1.0)
    costs = type(case.costs)(curves=case.costs.curves, curve_R=case.costs.curve_R, speed_R=speed_R)
    before_LS, after_LE = _plan(case).slot_to_expert_LS, drifted(case.load_LE)
    later = Case(model=model, machine=case.machine, load=case.load, phase=case.phase, costs=costs, load_LE=after_LE)
    new = _plan(later)
    repaired = _plan(later, current_LS=before_LS)
    limited = _plan(later, current_LS=before_LS, max_moves=30)
    balanced_LS = keep_slots(_balance(case, case.load_LE), _balance(later, after_LE), ranks)
    new_s = new.predicted_s_L.sum()
    layers = len(after_LE)
    assert repaired.current_s_L is not None, "there was a placement"
    assert repaired.moves is not None, "there was a placement"
    assert limited.moves is not None, "there was a placement"
    return Drift(
        name=f"{model.layers} x {model.experts}, {ranks} ranks",
        stale_over_new=float(repaired.current_s_L.sum() / new_s),
        repaired_over_new=float(repaired.predicted_s_L.sum() / new_s),
        limited_over_new=float(limited.predicted_s_L.sum() / new_s),
        balancer_over_new=float(predict_s_LR(after_LE, balanced_LS, costs).max(axis=1).sum() / new_s),
        repair_moves=len(repaired.moves) / layers,
        limited_moves=len(limited.moves) / layers,
        new_moves=_moves(before_LS, keep_slots(before_LS, new.slot_to_expert_LS, ranks), ranks) / layers,
        balancer_moves=_moves(_balance(case, case.load_LE), balanced_LS, ranks) / layers,
        slots=before_LS.shape[1],
    )


def _plan(
    case: Case, *, load_LE: Floats | None = None, current_LS: Ints | None = None, max_moves: int | None = None
) -> PlacementPlan:
    request = PlacementRequest(
        load_LE=case.load_LE if load_LE is None else load_LE,
        num_ranks=case.num_ranks,
        slots_per_rank=case.slots_per_rank,
        current_LS=current_LS,
        max_moves=max_moves,
    )
    return place_on(request, case.costs, expert_bytes=1)


def _balance(case: Case, load_LE: Floats) -> Ints:
    return balance_tokens(load_LE, num_slots=case.num_ranks * case.slots_per_rank, num_ranks=case.num_ranks)


def _moves(before_LS: Ints, after_LS: Ints, ranks: int) -> int:
    return len(moves_between(before_LS, after_LS, num_ranks=ranks, ranks_per_node=ranks, expert_bytes=1))


def _recorded_load() -> Floats:
    """Tokens of each expert of the bundled model over recorded text, half code and half prose."""
    from poise.bench.routed_text import EXPERTS, route_text

    recorded, _ = route_text()
    by_layer = recorded.chosen_WLTK.transpose(1, 0, 2, 3).reshape(recorded.chosen_WLTK.shape[1], -1)
    return np.stack([np.bincount(chosen, minlength=EXPERTS) for chosen in by_layer]).astype(float)


def _vllm_policy() -> Callable[[Floats, int, int], Ints] | None:
    """vLLM's default policy, flat; None where the package is not installed."""
    try:
        policy = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES["default"]
    except ImportError:
        return None
    import torch

    def balance(load_LE: Floats, slots: int, ranks: int) -> Ints:
        placed: Ints = policy.rebalance_experts(torch.from_numpy(load_LE), slots, 1, 1, ranks).numpy()
        return placed

    return balance


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


def _drift_table(drifts: Sequence[Drift]) -> Table:
    title = "After drift: time over a new placement's, and moves a layer"
    table = Table("case", "slots", title=title, title_justify="left")
    for column in ("stale", "repaired", "30 moves in all", "balancer", "new"):
        table.add_column(column, justify="right")
    for one in drifts:
        table.add_row(
            one.name,
            str(one.slots),
            f"{one.stale_over_new:.3f}, 0",
            f"{one.repaired_over_new:.3f}, {one.repair_moves:.1f}",
            f"{one.limited_over_new:.3f}, {one.limited_moves:.1f}",
            f"{one.balancer_over_new:.3f}, {one.balancer_moves:.1f}",
            f"1, {one.new_moves:.1f}",
        )
    return table
