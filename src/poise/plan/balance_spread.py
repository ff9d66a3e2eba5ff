"""Tokens of each expert over its copies, so that the slowest rank finishes soonest: the assignment for given copies.

Water-filling: the tokens of an expert rise to one level of time on all its copies, expert after expert, again and again, until
the slowest rank is no better for it. Tokens that are born where a copy is stay there first, since what they free on one link
they do not load another with; only then, and only from ranks that are still late, do they leave.
Compiled loops on ``balance_state``. Letters: R ranks, E experts, C copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.plan.balance_state import NONE, Step, level_s, set_quota, slowest_s
from poise.plan.compiled import compiled

CLOSE_FRAC = 2e-3
"""Of the time: differences that are let be."""
ROUNDS = 8
"""Over all experts; enough in practice."""
NARROWINGS = 16
CALM_ROUNDS = 3
LEAST_TOKENS = 1.0
"""Fewer are not worth an expert."""


@compiled
def spread(step: Step, most_rounds: int) -> int:
    """Sets all quotas of experts with several copies. Returns how many copies were set."""
    work = 0
    for stay in (True, False):
        best_s, calm = np.inf, 0
        for _ in range(most_rounds):
            level, last_s = level_s(step), slowest_s(step)
            if last_s <= (1.0 + CLOSE_FRAC) * level:
                return work
            calm = calm + 1 if best_s - last_s <= CLOSE_FRAC * last_s else 0
            if calm == CALM_ROUNDS:
                break
            best_s = min(best_s, last_s)
            for expert in range(len(step.expert_E)):
                if step.expert_E[expert]["copies"] > 1:
                    fill(step, expert, np.inf if stay else (1.0 + CLOSE_FRAC / 2) * level)
                    work += step.expert_E[expert]["copies"]
    return work


@compiled
def fill(step: Step, expert: int, late_s: float) -> None:
    """Spreads an expert's tokens. Those born with a copy leave it only if the rank now finishes later than ``late_s``, or if
    they are too few for an active expert."""
    its = step.expert_E[expert]
    level = _level_of(step, expert, late_s)
    left, place, taker, most_in = its["total"], its["first"], NONE, -np.inf
    while place != NONE:
        copy = step.copy_C[place]
        tokens, _ = _tokens_at(copy, step.rank_R[copy["rank"]], level, late_s)
        tokens = min(tokens, left)
        if tokens < LEAST_TOKENS:
            tokens = 0.0
        left -= tokens
        set_quota(step, place, tokens)
        if copy["shut"] == 0 and tokens - copy["born"] > most_in:
            taker, most_in = place, tokens - copy["born"]
        place = copy["next"]
    if left > 0.0:
        set_quota(step, taker, step.copy_C[taker]["quota"] + left)


@compiled
def _level_of(step: Step, expert: int, late_s: float) -> float:
    """The time up to which copies take exactly all tokens: Newton's method, kept between bounds."""
    total = step.expert_E[expert]["total"]
    level = top = 0.0
    place = step.expert_E[expert]["first"]
    while place != NONE:
        rank = step.rank_R[step.copy_C[place]["rank"]]
        level = max(level, rank["seconds"])
        top = max(top, (rank["token_s"] + rank["in_s"]) * total + rank["active_s"] + rank["seconds"])
        place = step.copy_C[place]["next"]
    low, high = 0.0, top
    for _ in range(NARROWINGS):
        tokens = slope = 0.0
        place = step.expert_E[expert]["first"]
        while place != NONE:
            copy = step.copy_C[place]
            taken, more = _tokens_at(copy, step.rank_R[copy["rank"]], level, late_s)
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
    return level


@compiled
def _tokens_at(copy: Any, rank: Any, level: float, late_s: float) -> tuple[float, float]:
    """The most tokens of a copy with which its rank finishes by ``level``, all else as it is, and the slope of that."""
    if copy["shut"] == 1:
        return 0.0, 0.0
    quota, born = copy["quota"], copy["born"]
    token_s, in_s, out_s = rank["token_s"], rank["in_s"], rank["out_s"]
    active = rank["active"] + (0.0 if quota > 0.0 else 1.0)
    wire_in_s = in_s * (rank["in"] - max(0.0, quota - born))
    wire_out_s = out_s * (rank["out"] - max(0.0, born - quota))
    born_s = rank["fixed_s"] + rank["active_s"] * active + token_s * (rank["tokens"] - quota + born)
    born_s += max(wire_in_s, wire_out_s)
    if level >= born_s:  # tokens born elsewhere come in; at first beside the heavier direction of the link
        free = (wire_out_s - wire_in_s) / in_s if wire_out_s > wire_in_s else 0.0
        if level <= born_s + token_s * free:
            return born + (level - born_s) / token_s, 1.0 / token_s
        return born + free + (level - born_s - token_s * free) / (token_s + in_s), 1.0 / (token_s + in_s)
    if rank["seconds"] <= late_s and out_s * born >= rank["active_s"]:
        return born, 0.0
    free = (wire_in_s - wire_out_s) / out_s if wire_in_s > wire_out_s else 0.0
    if level >= born_s - token_s * free:
        tokens, slope = born - (born_s - level) / token_s, 1.0 / token_s
    elif token_s > out_s:
        tokens, slope = born - free - (born_s - token_s * free - level) / (token_s - out_s), 1.0 / (token_s - out_s)
    else:
        tokens, slope = born - free, 0.0
    return (tokens, slope) if tokens > 0.0 else (0.0, 0.0)
