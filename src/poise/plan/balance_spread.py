"""Tokens of each expert over its copies, so that the slowest rank finishes soonest: the assignment for given copies.

Water-filling: the tokens of an expert rise to one level of time on all its copies, expert after expert, again and again, until
the slowest rank is no better for it. Tokens that are born where a copy is stay there first, since what they free on one link
they do not load another with; only then, and only from ranks that are still late, do they leave. A copy computes nothing, or
a rank's least at the least, unless it is the only one that has the expert.
Compiled loops on ``balance_state``. Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.plan.balance_state import NONE, Step, level_s, set_quota, slowest_s
from poise.plan.compiled import compiled

CLOSE_FRAC = 2e-3
"""Of the time: differences that are let be."""
LATE_FRAC = 5e-3
"""Of the time: by how much ranks may end apart."""
MOST_SET = 300
"""Copies set at one time; enough in practice for 8 ranks, and two or three rounds over 64."""
NARROWINGS = 16
_SHUT, _SHUT_NOW, _AT_LEAST = 1, 2, 3
"""``shut`` for good; while one expert is filled; and with exactly the least tokens meanwhile."""


@compiled
def spread(step: Step) -> int:
    """Sets all quotas of experts with several copies. Returns how many copies were set."""
    work = 0
    for stay in (True, False):
        best_s = np.inf
        while work < MOST_SET:
            level, last_s = level_s(step), slowest_s(step)
            if last_s <= (1.0 + LATE_FRAC) * level:
                return work
            if last_s > (1.0 - CLOSE_FRAC) * best_s:
                break
            best_s, late_s = last_s, (1.0 + LATE_FRAC / 2) * level
            for expert in range(len(step.expert_E)):
                if step.expert_E[expert]["copies"] > 1 and _is_late(step, expert, late_s):
                    fill(step, expert, np.inf if stay else late_s)
                    work += step.expert_E[expert]["copies"]
    return work


@compiled
def _is_late(step: Step, expert: int, late_s: float) -> bool:
    place = step.expert_E[expert]["first"]
    while place != NONE:
        copy = step.copy_C[place]
        if step.rank_R[copy["rank"]]["seconds"] > late_s:
            return True
        place = copy["next"]
    return False


@compiled
def fill(step: Step, expert: int, late_s: float) -> None:
    """Spreads an expert's tokens. Those born with a copy leave it only if the rank now finishes later than ``late_s``, or if
    they are too few for an active expert. A share below the least becomes none or the least, the smallest first."""
    its = step.expert_E[expert]
    first, total = its["first"], its["total"]
    _level(step, first, total, late_s)
    taker, is_changed = _set_smallest(step, first, total)
    while is_changed:
        _level(step, first, total, late_s)
        taker, is_changed = _set_smallest(step, first, total)
    left, place = total, first
    while place != NONE:
        copy = step.copy_C[place]
        if place != taker:
            tokens = min(copy["share"], left)
            left -= tokens
            set_quota(step, place, tokens)
        if copy["shut"] > _SHUT:
            copy["shut"] = 0
        place = copy["next"]
    set_quota(step, taker, left)


@compiled
def _set_smallest(step: Step, first: int, total: float) -> tuple[int, bool]:
    """Gives the open copy with the smallest share either none or the least that it may have, whichever is nearer, unless none
    has too little or no other is open. Returns the open copy with the largest share, and whether one was changed."""
    small, fewest, large, most, is_open = NONE, np.inf, NONE, -1.0, 0
    place, free = first, total
    while place != NONE:
        copy = step.copy_C[place]
        share, least = copy["share"], step.rank_R[copy["rank"]]["least"]
        if copy["shut"] == 0:
            is_open += 1
            if share < min(least, fewest):
                small, fewest = place, share
            if share > most:
                large, most = place, share
        elif copy["shut"] == _AT_LEAST:
            free -= least
        place = copy["next"]
    if small == NONE or is_open < 2:
        return large, False
    least = step.rank_R[step.copy_C[small]["rank"]]["least"]
    step.copy_C[small]["shut"] = _AT_LEAST if 2.0 * fewest >= least and free >= 2.0 * least else _SHUT_NOW
    return large, True


@compiled
def _level(step: Step, first: int, total: float, late_s: float) -> None:
    """Sets ``share``s so that copies finish at one time and take all tokens: Newton's method, kept between bounds."""
    level = top = weights = 0.0
    place = first
    while place != NONE:
        copy = step.copy_C[place]
        rank = step.rank_R[copy["rank"]]
        _prepare(copy, rank, late_s)
        level += rank["weight"] * rank["seconds"]
        weights += rank["weight"]
        top = max(top, (rank["token_s"] + rank["in_s"]) * total + rank["active_s"] + rank["seconds"])
        place = copy["next"]
    level /= weights
    low, high = 0.0, top
    for _ in range(NARROWINGS):
        tokens = slope = 0.0
        place = first
        while place != NONE:
            copy = step.copy_C[place]
            taken, more = _tokens_at(copy, step.rank_R[copy["rank"]], level)
            copy["share"] = taken
            tokens += taken
            slope += more
            place = copy["next"]
        if abs(tokens - total) <= 0.5 * CLOSE_FRAC * total:
            break
        if tokens > total:
            high = level
        else:
            low = level
        level = level + (total - tokens) / slope if slope > 0.0 else high
        if level <= low or level >= high:
            level = 0.5 * (low + high)


@compiled
def _prepare(copy: Any, rank: Any, late_s: float) -> None:
    """``born_s``: when the rank would finish with the copy's born tokens. ``free_in``: tokens that may then come in beside the
    heavier direction of the link, ``free_out``: that may go out; -1 where none leave."""
    quota, born = copy["quota"], copy["born"]
    active = rank["active"] + (0.0 if quota > 0.0 else 1.0)
    wire_in_s = rank["in_s"] * (rank["in"] - max(0.0, quota - born))
    wire_out_s = rank["out_s"] * (rank["out"] - max(0.0, born - quota))
    born_s = rank["fixed_s"] + rank["active_s"] * active + rank["token_s"] * (rank["tokens"] - quota + born)
    copy["born_s"] = born_s + rank["copies_s"] + max(wire_in_s, wire_out_s)
    copy["free_in"] = max(0.0, wire_out_s - wire_in_s) / rank["in_s"]
    if rank["seconds"] <= late_s and rank["out_s"] * born >= rank["active_s"]:
        copy["free_out"] = -1.0
    else:
        copy["free_out"] = max(0.0, wire_in_s - wire_out_s) / rank["out_s"]


@compiled
def _tokens_at(copy: Any, rank: Any, level: float) -> tuple[float, float]:
    """The most tokens of a copy with which its rank finishes by ``level``, all else as it is, and the slope of that."""
    if copy["shut"] != 0:
        return rank["least"] if copy["shut"] == _AT_LEAST else 0.0, 0.0
    born, token_s, over_s = copy["born"], rank["token_s"], level - copy["born_s"]
    if over_s >= 0.0:  # tokens born elsewhere come in
        free_s = token_s * copy["free_in"]
        if over_s <= free_s:
            return born + over_s / token_s, 1.0 / token_s
        slope = 1.0 / (token_s + rank["in_s"])
        return born + copy["free_in"] + (over_s - free_s) * slope, slope
    if copy["free_out"] < 0.0:
        return born, 0.0
    free_s = token_s * copy["free_out"]
    if over_s >= -free_s:
        tokens, slope = born + over_s / token_s, 1.0 / token_s
    elif token_s > rank["out_s"]:
        slope = 1.0 / (token_s - rank["out_s"])
        tokens = born - copy["free_out"] + (over_s + free_s) * slope
    else:
        tokens, slope = born - copy["free_out"], 0.0
    return (tokens, slope) if tokens > 0.0 else (0.0, 0.0)
