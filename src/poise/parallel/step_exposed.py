"""Behind the router (UltraEP's way, and an ablation of PROBE): replicas for true counts, which all ranks wait for."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from poise.parallel.group import RankGroup
from poise.parallel.step_ahead import Planning
from poise.parallel.step_news import Ints, RankNews, StepNews, exchanged
from poise.parallel.step_note import StepNote
from poise.parallel.step_plan import StepPlan
from poise.parallel.step_planner import NO_REPLICAS

LEAST_WAIT_S, EXPOSED_WAIT = 0.05, 4.0
"""Replicas that ranks wait for are given up after so long, and so many times what fetching should take."""


def fetch_exposed(
    group: RankGroup, planning: Planning, news: StepNews, note: StepNote
) -> tuple[StepPlan | None, Ints, float]:
    """All ranks at once: replicas that pay although all wait for them, those that have come, and how long that took."""
    windows, track, layer = planning.windows, planning.track, news.layer
    expert_s_R = planning.slots.slot_bytes / np.array(windows.rate_R(news))
    plan = planning.planner.plan_exposed(layer, news.counts_RE, expert_s_R, *news.fracs)
    note.declined = int(plan is None)
    if plan is None:
        windows.fetched(track.end_fetch())  # nothing: what is known of the rate is doubted
        return None, NO_REPLICAS, 0.0
    made = planning.begun(plan, layer=layer)
    began_s = perf_counter()
    moved_RR = plan.transfers_RR
    most = int(max(moved_RR.sum(axis=0).max(), moved_RR.sum(axis=1).max()))
    fetched = track.finish(within_s=LEAST_WAIT_S + EXPOSED_WAIT * most * float(expert_s_R.max()))
    windows.fetched(fetched, made.link_share)
    note.replica_bytes, note.replicas_planned = fetched.nbytes, len(fetched.arrived)
    own = RankNews(layer=layer, plan=made.digest, arrived=made.arrived_bits(fetched))
    nothing_E = np.zeros_like(news.counts_RE[0])
    came_N3 = made.came(exchanged(group, own, nothing_E, nothing_E))
    return made, came_N3, perf_counter() - began_s
