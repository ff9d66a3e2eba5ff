"""How much of what plans promise comes true: the share of the planned gain that true tokens bring.

Plans are made of predicted counts. Where those are wrong, or replicas late, copies bring less than was planned and take as
much of the processor as ever; so what a copy takes is held against that share of the gain. Ranks tell each other theirs and
go by that of rank 0, as gains may differ in the last bit.
"""

from __future__ import annotations

from poise.plan.balance import BalancePlan
from poise.plan.rank_costs import Floats

BELIEVED = 4.0
"""Plans like the first one that count as kept before it."""
KEEP = 0.9
"""Of what was seen before, for each layer with a plan that paid."""
DOUBT = 0.998
"""Times what is missing of promises, for each layer without one: who is mistrusted is tried again."""
LEAST_PERMILLE = 50


class PlanTrust:
    """Of one rank."""

    def __init__(self) -> None:
        self._promised_s = self._kept_s = 0.0

    @property
    def permille(self) -> int:
        """Of a planned gain that may be expected: ``LEAST_PERMILLE`` to 1000, and that before anything was promised."""
        if self._promised_s <= 0.0:
            return 1000
        return min(1000, max(LEAST_PERMILLE, round(1000 * self._kept_s / self._promised_s)))

    def saw(self, promised_s: float, kept_s: float) -> None:
        """Behind a layer: by how much the slowest rank was to end sooner, and by how much true tokens let it; 0 and 0 where
        nothing was planned."""
        if promised_s > 0.0:
            if self._promised_s <= 0.0:
                self._promised_s = self._kept_s = BELIEVED * promised_s
            self._promised_s = KEEP * self._promised_s + promised_s
            self._kept_s = max(0.0, KEEP * self._kept_s + kept_s)
        else:
            self._kept_s += (1.0 - DOUBT) * (self._promised_s - self._kept_s)


def promised_s(plan: BalancePlan | None, copy_s_R: Floats) -> float:
    """What a plan gains, without what copies take (``copy_s_R`` on each rank); 0 where nothing pays."""
    if plan is None or not plan.pays:
        return 0.0
    copies_RR = plan.transfers_RR
    ends_s_R = plan.predicted_s_R - (copies_RR.sum(axis=0) + copies_RR.sum(axis=1)) * copy_s_R
    return plan.unbalanced_s - float(ends_s_R.max())
