"""One plan in one compiled call: from counts to replicas and assignment, and from true counts to the assignment alone.

Plain arrays and numbers go in, because a named tuple of as many costs two microseconds more.
Letters: R ranks, E experts, S slots of all ranks, N replicas.
"""

from __future__ import annotations

import numpy as np

from poise.plan.balance_assignment import whole_tokens
from poise.plan.balance_choice import choose, replicas_of
from poise.plan.balance_greedy import choose_greedily
from poise.plan.balance_spread import spread
from poise.plan.balance_state import Counts, Group, Step, add_replica, holds, home_step
from poise.plan.balance_times import curves_s_R, touch_curves
from poise.plan.balance_trials import take_born
from poise.plan.compiled import compiled
from poise.plan.expert_loads import Floats, Ints
from poise.plan.layer_state import CostTable

WORTH_FRAC = 0.01
"""Of the layer's time. A plan that brings less is not worth its transfers: nothing is done."""

Figures = tuple[Ints, Ints, Ints, Ints, Floats, float, bool]
"""Replicas, those of an ``Assignment``, when ranks end, the slowest one without a plan, and whether replicas pay."""


@compiled
def balance(
    counts_RE: Counts,
    slot_to_expert_S: Ints,
    seconds_BAN: Floats,
    curve_R: Ints,
    rates_3R: Floats,
    first_octave: int,
    per_active: float,
    replica_slots: int,
    most_work: int,
    least_tokens: float,
    least_active: float,
    in_frac_R: Floats,
    out_frac_R: Floats,
    window_s_R: Floats,
    copy_s_R: Floats,
    is_greedy: bool,
) -> Figures:
    """``rates_3R``: how slow each rank is, ``token_s_R`` and ``expert_s_R`` of a ``Group``; the rest: of it and its table."""
    table = CostTable(seconds_BAN, first_octave, per_active, curve_R, rates_3R[0])
    group = Group(
        slot_to_expert_S, table, rates_3R[1], rates_3R[2], replica_slots, most_work, least_tokens, least_active
    )
    step, unbalanced_s, home_s = _at_home(counts_RE, group, in_frac_R, out_frac_R, window_s_R, copy_s_R)
    if is_greedy:
        choose_greedily(step, group, counts_RE, WORTH_FRAC * unbalanced_s)
    else:
        choose(step, group, counts_RE)
    seconds_R, replica_N3 = curves_s_R(step, table), replicas_of(step, group)
    pays = len(replica_N3) > 0 and seconds_R.max() <= (1.0 - WORTH_FRAC) * home_s
    if not pays:
        step, _, _ = _at_home(counts_RE, group, in_frac_R, out_frac_R, window_s_R, copy_s_R)
        seconds_R, replica_N3 = curves_s_R(step, table), replica_N3[:0]
    begin_E1, rank_N, tokens_N = whole_tokens(step)
    return replica_N3, begin_E1, rank_N, tokens_N, seconds_R, unbalanced_s, pays


@compiled
def divide(
    counts_RE: Counts,
    slot_to_expert_S: Ints,
    seconds_BAN: Floats,
    curve_R: Ints,
    rates_3R: Floats,
    first_octave: int,
    per_active: float,
    replica_slots: int,
    most_work: int,
    least_tokens: float,
    least_active: float,
    in_frac_R: Floats,
    out_frac_R: Floats,
    replica_N3: Ints,
) -> Figures:
    table = CostTable(seconds_BAN, first_octave, per_active, curve_R, rates_3R[0])
    group = Group(
        slot_to_expert_S, table, rates_3R[1], rates_3R[2], replica_slots, most_work, least_tokens, least_active
    )
    none_R = np.zeros(len(curve_R))  # windows are over, and what copies took is spent
    step, unbalanced_s, home_s = _at_home(counts_RE, group, in_frac_R, out_frac_R, none_R, none_R)
    taken_R = np.zeros(len(curve_R), dtype=np.int64)
    for place in range(len(replica_N3)):
        expert, source, target = replica_N3[place, 0], replica_N3[place, 1], replica_N3[place, 2]
        if holds(step, expert, target):
            continue
        taken_R[target] += 1
        assert taken_R[target] <= replica_slots, "more replicas on a rank than it has slots"
        take_born(step, add_replica(step, group, counts_RE, expert, source, target))
    spread(step)
    seconds_R = curves_s_R(step, table)
    if seconds_R.max() > home_s:
        step, _, _ = _at_home(counts_RE, group, in_frac_R, out_frac_R, none_R, none_R)
        seconds_R = curves_s_R(step, table)
    begin_E1, rank_N, tokens_N = whole_tokens(step)
    return replica_N3[:0], begin_E1, rank_N, tokens_N, seconds_R, unbalanced_s, True


@compiled
def _at_home(
    counts_RE: Counts, group: Group, in_frac_R: Floats, out_frac_R: Floats, window_s_R: Floats, copy_s_R: Floats
) -> tuple[Step, float, float]:
    """Tokens spread over the copies at home; the slowest rank's time with an even share for each, and so."""
    step = home_step(counts_RE, group, in_frac_R, out_frac_R, window_s_R, copy_s_R)
    home_s = unbalanced_s = curves_s_R(step, group.table).max()
    touch_curves(step, group)
    if len(group.slot_to_expert_S) > len(step.expert_E):
        spread(step)
        home_s = curves_s_R(step, group.table).max()
        if home_s > unbalanced_s:
            home_s = unbalanced_s
            step = home_step(counts_RE, group, in_frac_R, out_frac_R, window_s_R, copy_s_R)
            touch_curves(step, group)
    return step, unbalanced_s, home_s
