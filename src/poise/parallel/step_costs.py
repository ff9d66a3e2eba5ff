"""What experts cost on each rank, for planning each step: seen in the steps, or measured curves at the pace that is seen.

Ranks hear each other's times with the counts of every layer. Now and then rank 0 fits costs to the last passes and tells the
others, since ranks that fitted by themselves might differ in the last bit. Letters: N layers computed, R ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import torch

from poise.parallel.group import RankGroup
from poise.parallel.step_news import StepNews
from poise.plan.observed_costs import ObservedCost, Times, observed_costs, rank_costs
from poise.plan.rank_costs import RankCosts

INTERVAL = 8
"""Passes between two fits, of those of which there is news; the first ones come after 1, 2 and 4."""
KEPT = 16
"""Passes that count."""
_FAR_TOKENS = 2.0**20


class StepCosts:
    """``curves``: what was measured before, if anything. ``costs``: None until something is known."""

    def __init__(self, group: RankGroup, curves: RankCosts | None) -> None:
        self._group = group
        self._curves = curves
        self.costs = curves
        self._news: list[StepNews] = []
        self._has_news = False
        """On all ranks alike."""
        self._windows: deque[Times] = deque(maxlen=KEPT)
        self._passes = 0

    def saw(self, news: StepNews) -> None:
        """What ranks tell of the layer before."""
        self._has_news = True
        if self._group.is_first:
            self._news.append(news)

    def begin_pass(self) -> bool:
        """All ranks at once, before each pass: whether ``costs`` are new."""
        if not self._has_news:
            return False
        self._has_news = False
        if self._news:
            told = [[news.of(field) for news in self._news] for field in ("pairs", "active", "compute_us")]
            tokens_NR, active_NR, us_NR = np.array(told, dtype=float)
            self._windows.append(Times(tokens_NR=tokens_NR, active_NR=active_NR, seconds_NR=us_NR / 1e6))
            self._news = []
        self._passes += 1
        return (self._passes in (1, 2, 4) or not self._passes % INTERVAL) and self._refresh()

    def _refresh(self) -> bool:
        mine_R2 = torch.zeros(self._group.num_ranks, 2, dtype=torch.float64)
        if self._group.is_first:
            costs = observed_costs(list(self._windows), self._curves)
            if costs is not None:
                mine_R2 = torch.from_numpy(self._numbers(costs))
        told_R2 = self._group.all_gather(mine_R2.to(self._group.device))[0].cpu().numpy()
        if not told_R2.any():
            return False
        if self._curves is not None:
            self.costs = replace(self._curves, speed_R=np.ascontiguousarray(told_R2[:, 0]))
        else:
            self.costs = rank_costs([ObservedCost(expert_s=a, token_s=b) for a, b in told_R2.tolist()])
        return True

    def _numbers(self, costs: RankCosts) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """What tells each rank's costs: its speed on its curve, or its line."""
        if self._curves is not None:
            return np.stack([costs.speed_R, np.zeros(costs.num_ranks)], axis=1)
        ones_R = np.ones((1, costs.num_ranks))
        near_R, far_R = (costs.seconds_LR(tokens * ones_R, ones_R)[0] for tokens in (1.0, _FAR_TOKENS))
        token_R = (far_R - near_R) / (_FAR_TOKENS - 1.0)
        return np.stack([np.maximum(near_R - token_R, 0.0), token_R], axis=1)
