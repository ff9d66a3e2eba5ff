"""Trials, one at a time: a replica more, another in its place, a copy that computes nothing; kept if the slowest rank gains.

This finds what choosing one replica after the other misses, where there are few ranks. Work is limited, so that large groups
are planned as fast: they hardly need it. Compiled loops on ``balance_state``. Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

import numpy as np

from poise.plan.balance_spread import CLOSE_FRAC, LEAST_TOKENS, ROUNDS, fill, spread
from poise.plan.balance_state import (
    NONE,
    Counts,
    Group,
    Step,
    add_replica,
    copy_step,
    drop_replica,
    empty_step,
    holds,
    set_quota,
    slowest_s,
)
from poise.plan.compiled import compiled

MOST_WORK = 600
"""Copies that are set in trials, in all."""


@compiled
def try_others(step: Step, group: Group, counts_RE: Counts) -> None:
    """Replicas added, or put in place of others."""
    num_experts = counts_RE.shape[1]
    kept = empty_step(len(step.copy_C), num_experts, len(step.rank_R))
    copy_step(step, kept)
    work, improved = 0, True
    while improved:
        improved = False
        for slot in range(len(group.slot_to_expert_S), len(step.copy_C)):
            rank = step.copy_C[slot]["rank"]
            for expert in range(num_experts):
                if holds(step, expert, rank) or step.expert_E[expert]["total"] <= 0.0:
                    continue
                if work >= MOST_WORK:
                    return
                before_s = slowest_s(step)
                if not _exchange(step, group, counts_RE, slot, expert):
                    continue
                work += spread(step, ROUNDS) + len(step.copy_C)
                if slowest_s(step) < (1.0 - CLOSE_FRAC / 2) * before_s:
                    copy_step(step, kept)
                    improved = True
                else:
                    copy_step(kept, step)


@compiled
def try_fewer(step: Step) -> None:
    """Copies, replicas or not, that compute nothing: one active expert less."""
    kept = empty_step(len(step.copy_C), len(step.expert_E), len(step.rank_R))
    copy_step(step, kept)
    least_s = CLOSE_FRAC * slowest_s(step) * len(step.rank_R)
    for place in range(len(step.copy_C)):
        copy = step.copy_C[place]
        if copy["expert"] == NONE or copy["quota"] == 0.0 or step.rank_R[copy["rank"]]["active_s"] < least_s:
            continue
        if _active_copies(step, copy["expert"]) < 2:
            continue
        before_s = slowest_s(step)
        copy["shut"] = 1
        fill(step, copy["expert"], np.inf)
        spread(step, ROUNDS)
        if slowest_s(step) < (1.0 - CLOSE_FRAC / 2) * before_s:
            copy_step(step, kept)
        else:
            copy_step(kept, step)


@compiled
def source_of(step: Step, expert: int) -> int:
    """The rank that has the expert at home and may still give most."""
    best, most = NONE, 0
    place = step.expert_E[expert]["first"]
    while place != NONE:
        copy = step.copy_C[place]
        gives = step.rank_R[copy["rank"]]["gives"]
        if copy["source"] == NONE and gives > most:
            best, most = copy["rank"], gives
        place = copy["next"]
    return best


@compiled
def take_born(step: Step, copy: int) -> None:
    """Tokens born on a new copy's rank, out of those that come to the first copy from elsewhere."""
    new = step.copy_C[copy]
    place = step.expert_E[new["expert"]]["first"]
    first = step.copy_C[place]
    tokens = min(new["born"], first["quota"] - min(first["quota"], first["born"]))
    if tokens >= LEAST_TOKENS:
        set_quota(step, place, first["quota"] - tokens)
        set_quota(step, copy, tokens)


@compiled
def _active_copies(step: Step, expert: int) -> int:
    count, place = 0, step.expert_E[expert]["first"]
    while place != NONE:
        count += 1 if step.copy_C[place]["quota"] > 0.0 else 0
        place = step.copy_C[place]["next"]
    return count


@compiled
def _exchange(step: Step, group: Group, counts_RE: Counts, slot: int, expert: int) -> bool:
    """Puts a replica of ``expert`` into ``slot``, whatever is there; False, and nothing done, where none may come."""
    old = step.copy_C[slot]
    is_free = old["expert"] == NONE
    source = source_of(step, expert)
    place = step.expert_E[expert]["first"]
    while source == NONE and not is_free and place != NONE:
        copy = step.copy_C[place]
        if copy["source"] == NONE and copy["rank"] == old["source"]:
            source = old["source"]  # gives this one in place of the old one
        place = copy["next"]
    if source == NONE or (is_free and step.rank_R[old["rank"]]["slots"] == 0):
        return False
    if not is_free:
        drop_replica(step, slot)
    take_born(step, add_replica(step, group, counts_RE, expert, source, old["rank"]))
    return True
