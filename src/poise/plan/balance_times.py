"""When ranks finish a step that is balanced: by their curves, and the planes that touch them, which searches go by.

Compiled, on ``balance_state``. Letters: R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.plan.balance_state import Group, Step, finish_s
from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Floats
from poise.plan.layer_state import CostTable, rank_s

TOUCH_FRAC = 0.05
"""Of the tokens around a point, over which the slope there is taken."""


@compiled
def curves_s_R(step: Step, table: CostTable) -> Floats:
    """When ranks finish by their curves themselves."""
    seconds_R = np.empty(len(step.rank_R))
    for rank in range(len(seconds_R)):
        its = step.rank_R[rank]
        seconds_R[rank] = its["copies_s"] + max(its["in_s"] * its["in"], its["out_s"] * its["out"])
        seconds_R[rank] += rank_s(table, rank, its["tokens"], its["active"])
    return seconds_R


@borrowing
def touch_curves(step: Step, group: Group) -> None:
    """Makes times linear around where ranks would be with tokens by their speed."""
    table = group.table
    total = speed = 0.0
    for rank in range(len(step.rank_R)):
        total += step.rank_R[rank]["tokens"]
        speed += 1.0 / table.slowness_R[rank]
    for rank in range(len(step.rank_R)):
        its = step.rank_R[rank]
        tokens, active = max(1.0, total / table.slowness_R[rank] / speed), max(1.0, its["active"])
        middle_s = rank_s(table, rank, tokens, active)
        rise_s = rank_s(table, rank, (1.0 + TOUCH_FRAC) * tokens, active)
        rise_s -= rank_s(table, rank, (1.0 - TOUCH_FRAC) * tokens, active)
        its["token_s"] = max(rise_s / (2.0 * TOUCH_FRAC), 1e-6 * middle_s) / tokens
        active_s = rank_s(table, rank, tokens, active + 0.5) - rank_s(table, rank, tokens, active - 0.5)
        its["active_s"] = max(0.0, active_s)
        its["fixed_s"] = middle_s - its["token_s"] * tokens - its["active_s"] * active
        its["least"] = max(1.0, group.least_tokens, group.least_active * its["active_s"] / its["token_s"])
        its["weight"] = 1.0 / (its["token_s"] + 0.5 * its["in_s"])
        _set_rates(its)
        its["seconds"] = finish_s(its)


@borrowing
def _set_rates(its: Any) -> None:
    its["per_token_s"], its["per_come_s"] = 1.0 / its["token_s"], 1.0 / (its["token_s"] + its["in_s"])
    its["per_leave_s"] = 1.0 / (its["token_s"] - its["out_s"]) if its["token_s"] > its["out_s"] else 0.0
    its["per_in_s"], its["per_out_s"] = 1.0 / its["in_s"], 1.0 / its["out_s"]
