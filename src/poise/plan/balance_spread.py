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

from poise.plan.balance_state import NONE, Records, Step, level_s, set_quota, slowest_s
from poise.plan.compiled import borrowing

CLOSE_FRAC = 2e-3
"""Of the time: differences that are let be."""
LATE_FRAC = 5e-3
"""Of the time: by how much ranks may end apart."""
MOST_SET = 300
"""Copies set at one time; enough in practice for 8 ranks, and two or three rounds over 64."""
NARROWINGS = 16
_SHUT, _AT_LEAST = 1, 2
"""While one expert is filled: a copy without tokens, and one with exactly the least."""


@borrowing
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


@borrowing
def _is_late(step: Step, expert: int, late_s: float) -> bool:
    place = step.expert_E[expert]["first"]
    while place != NONE:
        copy = step.copy_C[place]
        if step.rank_R[copy["rank"]]["seconds"] > late_s:
            return True
        place = copy["next"]
    return False


@borrowing
def fill(step: Step, expert: int, late_s: float) -> None:
    """Spreads an expert's tokens. Those born with a copy leave it only if the rank now finishes later than ``late_s``, or if
    they are too few for an active expert. A share below the least becomes none or the least, the smallest first."""
    total, line_R, count = step.expert_E[expert]["total"], step.line_R, 0
    level = top = weights = 0.0
    place = step.expert_E[expert]["first"]
    while place != NONE:
        copy, line = step.copy_C[place], line_R[count]
        rank = step.rank_R[copy["rank"]]
        line["copy"] = place
        _prepare(line, copy, rank, late_s)
        level += rank["weight"] * rank["seconds"]
        weights += rank["weight"]
        top = max(top, (rank["token_s"] + rank["in_s"]) * total + rank["active_s"] + rank["seconds"])
        place, count = copy["next"], count + 1
    level = _level(line_R, count, total, level / weights, top)
    taker, is_changed = _set_smallest(line_R, count, total)
    while is_changed:
        level = _level(line_R, count, total, level, top)
        taker, is_changed = _set_smallest(line_R, count, total)
    left = total
    for place in range(count):
        if place != taker:
            tokens = min(line_R[place]["share"], left)
            left -= tokens
            set_quota(step, line_R[place]["copy"], tokens)
    set_quota(step, line_R[taker]["copy"], left)


@borrowing
def _set_smallest(line_R: Records, count: int, total: float) -> tuple[int, bool]:
    """Gives the open copy with the smallest share either none or the least that it may have, whichever is nearer, unless none
    has too little or no other is open. Returns the open copy with the largest share, and whether one was changed."""
    small, fewest, large, most, is_open, free = NONE, np.inf, NONE, -1.0, 0, total
    for place in range(count):
        line = line_R[place]
        share, least = line["share"], line["least"]
        if line["shut"] == 0:
            is_open += 1
            if share < min(least, fewest):
                small, fewest = place, share
            if share > most:
                large, most = place, share
        elif line["shut"] == _AT_LEAST:
            free -= least
    if small == NONE or is_open < 2:
        return large, False
    line = line_R[small]
    is_least = 2.0 * fewest >= line["least"] and free >= 2.0 * line["least"]
    _fix(line, _AT_LEAST if is_least else _SHUT, line["least"] if is_least else 0.0)
    return large, True


@borrowing
def _level(line_R: Records, count: int, total: float, level: float, top: float) -> float:
    """Sets ``share``s so that copies finish at one time and take all tokens: Newton's method from ``level``, kept between
    bounds. Returns that time."""
    low, high = 0.0, top
    for _ in range(NARROWINGS):
        tokens = slope = 0.0
        for place in range(count):
            line = line_R[place]
            rate, far_rate, away_rate, fewest = line["near_rate"], line["far_rate"], line["away_rate"], line["fewest"]
            share, far, away = (
                line["near"] + level * rate,
                line["far"] + level * far_rate,
                line["away"] + level * away_rate,
            )
            rate, share = (far_rate, far) if far < share else (rate, share)
            rate, share = (away_rate, away) if away < share else (rate, share)
            rate, share = (0.0, fewest) if share <= fewest else (rate, share)
            line["share"] = share
            tokens += share
            slope += rate
        if abs(tokens - total) <= 0.5 * CLOSE_FRAC * total:
            break
        if tokens > total:
            high = level
        else:
            low = level
        level = level + (total - tokens) / slope if slope > 0.0 else high
        if level <= low or level >= high:
            level = 0.5 * (low + high)
    return level


@borrowing
def _fix(line: Any, shut: int, tokens: float) -> None:
    """A copy that gets so many tokens, however late others are."""
    line["shut"], line["fewest"], line["near"] = shut, tokens, -np.inf


@borrowing
def _prepare(line: Any, copy: Any, rank: Any, late_s: float) -> None:
    """The most tokens of a copy with which its rank finishes by a level, all else as it is: the least of three lines, and
    ``fewest`` at the least. ``near``: tokens travel beside the heavier direction of the link; ``far``: tokens that come in make
    it later; ``away``: tokens that leave do."""
    quota, born, token_s = copy["quota"], copy["born"], rank["token_s"]
    wire_in_s = rank["in_s"] * (rank["in"] - max(0.0, quota - born))
    wire_out_s = rank["out_s"] * (rank["out"] - max(0.0, born - quota))
    active = rank["active"] + (0.0 if quota > 0.0 else 1.0)
    born_s = rank["fixed_s"] + rank["active_s"] * active + token_s * (rank["tokens"] - quota + born)
    born_s += rank["copies_s"] + max(wire_in_s, wire_out_s)
    come = max(0.0, wire_out_s - wire_in_s) * rank["per_in_s"]
    leave = max(0.0, wire_in_s - wire_out_s) * rank["per_out_s"]
    near, far, away = rank["per_token_s"], rank["per_come_s"], rank["per_leave_s"]
    line["near"], line["near_rate"] = born - born_s * near, near
    line["far"], line["far_rate"] = born + come - (born_s + token_s * come) * far, far
    line["away"], line["away_rate"] = born - leave - (born_s - token_s * leave) * away, away
    line["shut"], line["least"], line["fewest"] = 0, rank["least"], 0.0
    if away == 0.0:
        line["away"], line["fewest"] = np.inf, max(0.0, born - leave)
    if rank["seconds"] <= late_s and rank["out_s"] * born >= rank["active_s"]:
        line["fewest"] = born
    if copy["shut"] != 0:
        _fix(line, _SHUT, 0.0)
