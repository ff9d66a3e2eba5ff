"""Moves after drift, and what each further move is worth: time over a new placement's against moves.

No law of how loads drift is published: the drift here is an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from poise.bench.place.cases import Case, Model, case_of, drifted
from poise.bench.place.contenders import balance, plan
from poise.plan.moves import keep_slots, moves_between
from poise.plan.placement import predict_s_LR
from poise.plan.rank_costs import Ints

MOVED = ((0, 8), (0, 32), (1, 8), (2, 8))
"""(model, ranks) of the cases."""
TRADED = ((0, 8), (0, 32), (2, 8))
SLOWED_FRAC = 0.1
"""With drift, the first rank also becomes slower by this share."""
LEAST_GAIN_FRACS = (0.0, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """After drift: moves a layer (experts that come to another rank), and times over that of a new placement.

    ``repaired``: by moves that are worth it; ``close``: by all that it takes to be within 1 % of a new placement; ``limited``:
    by 30 moves in all."""

    name: str
    stale_over_new: float
    repaired_over_new: float
    close_over_new: float
    limited_over_new: float
    balancer_over_new: float
    repair_moves: float
    close_moves: float
    limited_moves: float
    new_moves: float
    balancer_moves: float
    slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trade:
    """Where moves stop that save less than ``least_gain_frac`` of their layer's time. ``start``: the contiguous placement
    that engines begin with, or one made before the drift. 1: no move at all."""

    name: str
    start: str
    least_gain_frac: float
    moves: float
    over_new: float


def drift_of(model: Model, ranks: int) -> Drift:
    """Loads drift and the first rank slows down: what each way of going on costs in moves, and what it leaves."""
    case, later = _before_and_after(model, ranks)
    before_LS, after_LE, costs = plan(case).slot_to_expert_LS, later.load_LE, later.costs
    new = plan(later)
    repaired = plan(later, current_LS=before_LS)
    close = plan(later, current_LS=before_LS, least_gain_frac=0.0)
    limited = plan(later, current_LS=before_LS, max_moves=30)
    balanced_LS = keep_slots(balance(case, case.load_LE), balance(later, after_LE), ranks)
    new_s = new.predicted_s_L.sum()
    layers = len(after_LE)
    assert repaired.current_s_L is not None, "there was a placement"
    assert repaired.moves is not None, "there was a placement"
    assert close.moves is not None, "there was a placement"
    assert limited.moves is not None, "there was a placement"
    return Drift(
        name=f"{model.layers} x {model.experts}, {ranks} ranks",
        stale_over_new=float(repaired.current_s_L.sum() / new_s),
        repaired_over_new=float(repaired.predicted_s_L.sum() / new_s),
        close_over_new=float(close.predicted_s_L.sum() / new_s),
        limited_over_new=float(limited.predicted_s_L.sum() / new_s),
        balancer_over_new=float(predict_s_LR(after_LE, balanced_LS, costs).max(axis=1).sum() / new_s),
        repair_moves=len(repaired.moves) / layers,
        close_moves=len(close.moves) / layers,
        limited_moves=len(limited.moves) / layers,
        new_moves=_moves(before_LS, keep_slots(before_LS, new.slot_to_expert_LS, ranks), ranks) / layers,
        balancer_moves=_moves(balance(case, case.load_LE), balanced_LS, ranks) / layers,
        slots=before_LS.shape[1],
    )


def trades_of(model: Model, ranks: int) -> Iterator[Trade]:
    """Both starts of a case, with ever larger gains asked of a move."""
    case, later = _before_and_after(model, ranks)
    slots = ranks * case.slots_per_rank
    contiguous_LS = np.tile(np.arange(slots) % model.experts, (model.layers, 1))
    starts = (("contiguous", case, contiguous_LS), ("drifted", later, plan(case).slot_to_expert_LS))
    for start, now, current_LS in starts:
        new_s = plan(now).predicted_s_L.sum()
        for least in (*LEAST_GAIN_FRACS, None):
            if least is None:
                moves, seconds = 0.0, predict_s_LR(now.load_LE, current_LS, now.costs).max(axis=1).sum()
            else:
                found = plan(now, current_LS=current_LS, least_gain_frac=least)
                assert found.moves is not None, "there was a placement"
                moves, seconds = len(found.moves) / model.layers, found.predicted_s_L.sum()
            yield Trade(
                name=f"{model.layers} x {model.experts}, {ranks} ranks",
                start=start,
                least_gain_frac=1.0 if least is None else least,
                moves=moves,
                over_new=float(seconds / new_s),
            )


def _before_and_after(model: Model, ranks: int) -> tuple[Case, Case]:
    case = case_of(model, ranks, "spread-7", "lognormal", "prefill")
    speed_R = case.costs.speed_R * np.where(np.arange(ranks) == 0, 1.0 - SLOWED_FRAC, 1.0)
    costs = type(case.costs)(curves=case.costs.curves, curve_R=case.costs.curve_R, speed_R=speed_R)
    after_LE = drifted(case.load_LE)
    return case, Case(
        model=model, machine=case.machine, load=case.load, phase=case.phase, costs=costs, load_LE=after_LE
    )


def _moves(before_LS: Ints, after_LS: Ints, ranks: int) -> int:
    return len(moves_between(before_LS, after_LS, num_ranks=ranks, ranks_per_node=ranks, expert_bytes=1))


def drift_table(drifts: Sequence[Drift]) -> Table:
    title = "After drift: time over a new placement's, and moves a layer"
    table = Table("case", "slots", title=title, title_justify="left")
    for column in ("stale", "repaired", "within 1 %", "30 moves in all", "balancer", "new"):
        table.add_column(column, justify="right")
    for one in drifts:
        table.add_row(
            one.name,
            str(one.slots),
            f"{one.stale_over_new:.3f}, 0",
            f"{one.repaired_over_new:.3f}, {one.repair_moves:.1f}",
            f"{one.close_over_new:.3f}, {one.close_moves:.1f}",
            f"{one.limited_over_new:.3f}, {one.limited_moves:.1f}",
            f"{one.balancer_over_new:.3f}, {one.balancer_moves:.1f}",
            f"1, {one.new_moves:.1f}",
        )
    return table


def trade_table(trades: Sequence[Trade]) -> Table:
    """Moves a layer and time over a new placement's, for each gain that is asked of a move."""
    title = "Time over a new placement's, and moves a layer, where a move must save this share of its layer's time"
    table = Table("case", "start", title=title, title_justify="left")
    for least in LEAST_GAIN_FRACS:
        table.add_column(f"{least:.2%}", justify="right")
    table.add_column("no move", justify="right")
    rows: dict[tuple[str, str], list[str]] = {}
    for one in trades:
        rows.setdefault((one.name, one.start), []).append(f"{one.over_new:.3f}, {one.moves:.1f}")
    for key, cells in rows.items():
        table.add_row(*key, *cells)
    return table
