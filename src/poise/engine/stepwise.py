"""Puts together what balances each step on one rank (``parallel.step_balance``): planner, links, slots, track, look ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from poise.engine.blueprint import Blueprint
from poise.engine.online_lookahead import RANK_RULE, OnlineLearner
from poise.engine.own_cores import all_can_look_aside
from poise.engine.rank_learning import AsideLearning, RankLearning
from poise.errors import UsageError
from poise.model.lookahead import Lookahead
from poise.parallel.copy_cost import CopyCost
from poise.parallel.forecast import Ahead, Forecast, LastPass, Replayed
from poise.parallel.group import RankGroup
from poise.parallel.learning import Learning
from poise.parallel.links import open_links
from poise.parallel.migration import Migration
from poise.parallel.rank_experts import RankExperts
from poise.parallel.replica_slots import ReplicaSlots
from poise.parallel.replica_staging import Outlet
from poise.parallel.replica_track import ReplicaTrack
from poise.parallel.row_links import RowLinks
from poise.parallel.step_ahead import Foresight, Inline, Planning
from poise.parallel.step_balance import StepBalance
from poise.parallel.step_costs import StepCosts
from poise.parallel.step_options import StepOptions
from poise.parallel.step_planner import Links, StepPlanner
from poise.parallel.step_thread import OnThread
from poise.parallel.step_windows import Windows
from poise.plan.rank_costs import RankCosts
from poise.plan.step_rest import RestRule, StepRest
from poise.units import KIB, MIB

CHUNK_S = 2e-3
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 64 * KIB, 2 * MIB
TRIED_BYTES, TRIALS = 2 * MIB, 4
"""Of a message, to try links out with: more than a link lets through at once after a pause."""


def stepwise(
    group: RankGroup,
    experts: RankExperts,
    migration: Migration,
    options: StepOptions,
    drawn: Blueprint,
    *,
    lookahead: Lookahead | None,
    curves: RankCosts | None,
) -> tuple[StepBalance, Learning | None]:
    """All ranks at once; and when ``lookahead`` learns, if it does. ``lookahead``: where ``options`` want one. ``curves``: of
    the ranks, where they were measured. Raises UsageError."""
    placement, sources_LE = migration.placement, drawn.layout.experts_LE
    layers, num_experts = len(placement.layers), placement.num_experts
    forecast = forecast_of(options, lookahead, rank=group.rank, num_layers=layers, num_experts=num_experts)
    links_R = _link_rates(group)
    chunk_bytes = options.chunk_bytes or int(np.clip(CHUNK_S * np.median(links_R), LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES))
    slots = ReplicaSlots(sources_LE, replica_slots=options.replica_slots, device=group.device)
    links = Links(
        bytes_per_s_R=links_R,
        token_bytes=drawn.spec.hidden * drawn.dtype.dtype.itemsize,
        expert_bytes=slots.slot_bytes,
    )
    make_planner = partial(
        StepPlanner,
        placement.slot_to_expert_LS.astype(np.int64),
        links,
        num_experts=num_experts,
        replica_slots=options.replica_slots,
        most_work=options.most_work,
        costs=curves,
    )
    rows = (
        None if forecast is None or not _is_aside(group, options) else RowLinks(group, open_links(group, name="ahead"))
    )
    planning = Planning(
        planner=make_planner(),
        windows=Windows(layers, links_R, chunk_bytes=chunk_bytes),
        slots=slots,
        track=ReplicaTrack(
            open_links(group),
            Outlet(experts.bytes_at_home, group.device, num_ranks=group.num_ranks, chunk_bytes=chunk_bytes).chunk,
            chunk_bytes=chunk_bytes,
            suspends=options.suspends,
        ),
        rank=group.rank,
        num_ranks=group.num_ranks,
        num_layers=layers,
    )
    ahead, learning = None, None
    if forecast is not None:
        learns = lookahead if options.online else None
        ahead, learning = _looking_ahead(rows, forecast, planning, make_planner, learns, device=group.device)
    balance = StepBalance(
        group,
        planning,
        StepCosts(group, curves),
        CopyCost(slots.slot_bytes, has_engine=options.copy_engines or group.device.type == "cuda"),
        ahead,
        num_experts=num_experts,
        rest=StepRest(RestRule()) if options.rests and options.predictor != "replayed" else None,
    )
    return balance, learning


def _is_aside(group: RankGroup, options: StepOptions) -> bool:
    """All ranks at once, and on all alike: whether it is predicted and planned on a thread of its own."""
    return options.ahead == "thread" or (options.ahead == "auto" and all_can_look_aside(group))


def _looking_ahead(
    rows: RowLinks | None,
    forecast: Forecast,
    planning: Planning,
    make_planner: Callable[[], StepPlanner],
    learns: Lookahead | None,
    *,
    device: torch.device,
) -> tuple[Foresight, Learning | None]:
    """Where it is predicted and planned, aside with ``rows``, and when that which ``learns`` does so."""
    if rows is None:
        return Inline(forecast, planning), None if learns is None else RankLearning(learns)
    learner = None if learns is None else OnlineLearner(learns, RANK_RULE)
    ahead = OnThread(
        rows,
        forecast,
        replace(planning, planner=make_planner()),
        device=device,
        learn=None if learner is None else learner.idle,
    )
    return ahead, None if learner is None else AsideLearning(learner, ahead.submit, num_layers=planning.num_layers)


def forecast_of(
    options: StepOptions, lookahead: Lookahead | None, *, rank: int, num_layers: int, num_experts: int
) -> Forecast | None:
    """Who predicts; None: nobody, replicas are fetched behind the router. Raises UsageError."""
    if options.predictor == "none":
        return None
    if options.predictor == "replayed":
        assert options.replay is not None, "there is a file to replay"
        return Replayed(_replay(options.replay, rank, num_layers, num_experts))
    if options.predictor == "last":
        return LastPass(num_layers, num_experts)
    assert lookahead is not None, "whoever asks routers early has drawn the model up with that"
    return Ahead(lookahead, num_layers, num_experts, online=options.online)


def _replay(file: Path, rank: int, num_layers: int, num_experts: int) -> npt.NDArray[np.int64]:
    """Counts of a rank: an array of (ranks, passes, layers, experts) in a NumPy file."""
    try:
        counts_RPLE = np.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"counts to replay cannot be read from {file}: {error}") from None
    if counts_RPLE.ndim != 4 or counts_RPLE.shape[2:] != (num_layers, num_experts) or rank >= len(counts_RPLE):
        raise UsageError(
            f"{file} has counts of {counts_RPLE.shape} ranks, passes, layers and experts; the model has {num_layers} layers "
            f"of {num_experts} experts"
        )
    return np.asarray(counts_RPLE[rank], dtype=np.int64)


def _link_rates(group: RankGroup) -> npt.NDArray[np.float64]:
    """All ranks at once: bytes a second of each one's link, as it is tried out while all send to their next neighbours."""
    ranks = group.num_ranks
    sent = torch.zeros(TRIED_BYTES, dtype=torch.uint8, device=group.device)
    came = torch.empty_like(sent)
    to_R, from_R = [0] * ranks, [0] * ranks
    to_R[(group.rank + 1) % ranks] = from_R[(group.rank - 1) % ranks] = TRIED_BYTES
    least_s = np.inf
    for _ in range(TRIALS):
        began_s = perf_counter()
        group.all_to_all(came, sent, from_R, to_R)
        least_s = min(least_s, perf_counter() - began_s)
    told = torch.tensor([TRIED_BYTES / least_s], dtype=torch.float64, device=group.device)
    return np.asarray(group.all_gather(told)[:, 0].cpu().numpy())
