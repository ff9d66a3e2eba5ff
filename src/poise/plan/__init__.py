"""Planners: numbers in, a frozen plan out; no torch, no clock, no I/O.

For people who bring their own engine: ``from poise.plan import balance_step, place_experts, plan_pipeline``, each loaded on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["balance_step", "place_experts", "plan_pipeline"]

if TYPE_CHECKING:
    from poise.plan.balance_request import balance_step
    from poise.plan.pipeline import plan_pipeline
    from poise.plan.placement import place_experts


def __getattr__(name: str) -> object:
    if name == "balance_step":
        from poise.plan.balance_request import balance_step

        return balance_step
    if name == "place_experts":
        from poise.plan.placement import place_experts

        return place_experts
    if name == "plan_pipeline":
        from poise.plan.pipeline import plan_pipeline

        return plan_pipeline
    raise AttributeError(f"module 'poise.plan' has no attribute {name!r}")
