"""Watches the ranks while they run, and gives them another placement when the policy says so.

Every ``interval`` passes all ranks tell each other where tokens went and how fast experts were. Rank 0 asks the policy, on a
thread of its own; when there is a proposal it says so in an agreement, and all ranks begin to move experts before that pass.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from poise.engine.planner_thread import PlannerThread
from poise.engine.window_news import WindowFigures, WindowNews, heard, told
from poise.parallel.changes import changes_between
from poise.parallel.group import RankGroup
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers
from poise.plan.observed_costs import Times
from poise.plan.rank_costs import RankCosts
from poise.plan.rebalance import Planner, Proposal, Rebalance, Window
from poise.spec.placement import Placement
from poise.units import format_s

logger = logging.getLogger(__name__)

_SLICE_S = 0.2
_LISTED = 16
"""Moves that are listed for people."""
OTHER_WORK = 2.0
"""Windows whose (token, expert) pairs differ by more than this factor are of other work: prefill and decode."""
_REHEARSED = 4
"""Windows that make a policy go through all it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebalanced:
    """One change of the placement: before which pass it began, why, what was expected of it, what moved. ``moves``: (layer of
    the model, expert, from rank, to rank) of each.

    Only rank 0 knows why, and ``came_frac``, what came of ``gain_frac``, give or take ``came_error_frac``; None: not known.
    """

    at_pass: int
    reason: str
    gain_frac: float | None
    moved_experts: int
    changed_layers: int
    moves: tuple[tuple[int, int, int, int], ...]
    came_frac: float | None = None
    came_error_frac: float | None = None


class Balancing:
    """``step`` is called on all ranks before each pass; ``has_proposal`` goes into this rank's part of the agreement.

    ``curves``: what experts cost on each rank, where that was measured before.
    """

    def __init__(
        self,
        group: RankGroup,
        layers: ExpertParallelLayers,
        migration: Migration,
        policy: Rebalance,
        *,
        curves: RankCosts | None = None,
    ) -> None:
        self._group = group
        self._layers = layers
        self._migration = migration
        self._policy = policy
        self._passes = 0
        self._is_settled = True
        self._thread = PlannerThread()
        self._asked: deque[Future[Proposal | None]] = deque()
        layers.records = []
        layers.counts_LE = np.zeros((len(layers.copies_L), migration.placement.num_experts), dtype=np.int64)
        self._planner: Planner = policy.start(curves)
        """On rank 0 only it is ever asked."""
        self._rehearsal: Future[None] | None = None
        if group.is_first:
            self._rehearsal = self._thread.submit(_rehearse, policy.start(curves), _any_window(migration.placement))
        self._history: list[Rebalanced] = []
        self.figures: list[WindowFigures] = []
        """Of all windows, on all ranks alike."""

    def get_ready(self) -> None:
        """Returns when the policy's loops are compiled, which would slow the first passes down. It takes long the first time on
        a machine. Raises RankLostError when a rank is lost meanwhile."""
        while self._rehearsal is not None:
            try:
                self._rehearsal.result(timeout=_SLICE_S)
            except TimeoutError:
                self._group.check()
            else:
                self._rehearsal = None

    @property
    def history(self) -> list[Rebalanced]:
        """All changes, on all ranks; on rank 0 with what came of them."""
        outcomes = [*self._planner.outcomes, *[None] * len(self._history)]
        return [
            change
            if outcome is None
            else replace(change, came_frac=outcome.gain_frac, came_error_frac=outcome.error_frac)
            for change, outcome in zip(self._history, outcomes, strict=False)
        ]

    @property
    def has_proposal(self) -> bool:
        """On rank 0: whether a proposal is ready to begin with. Raises what broke the planner."""
        while self._asked and self._asked[0].done():
            if self._asked[0].result() is not None:
                return self._migration.is_idle
            self._asked.popleft()
        return False

    def step(self, *, proposed: bool) -> None:
        """Before a pass. ``proposed``: what rank 0 said of ``has_proposal`` in this agreement."""
        if proposed:
            self._begin()
        if self._passes and self._passes % self._policy.interval == 0:
            self._look()
        self._is_settled &= self._migration.is_idle
        self._passes += 1

    def table(self) -> list[str]:
        """Two lines for each change: when, why, and what the slowest rank's experts took before and after; then what moved."""
        interval = self._policy.interval
        return [line for each in self.history for line in (_line(each, self.figures, interval), _moved(each))]

    def close(self) -> None:
        """Ends the planner's thread, which may be at something yet."""
        self._thread.close()

    def _begin(self) -> None:
        """All ranks: learn the new placement from rank 0, and begin to move."""
        old = self._migration.placement
        proposal: Proposal | None = None
        mine = torch.zeros(old.slot_to_expert_LS.shape, dtype=torch.int64)
        if self._group.is_first:
            proposal = self._asked.popleft().result()
            assert proposal is not None, "rank 0 has a proposal"
            mine = torch.from_numpy(np.ascontiguousarray(proposal.slot_to_expert_LS, dtype=np.int64))
        chosen_LS = self._group.all_gather(mine.to(self._group.device))[0].cpu().numpy().astype(np.int32)
        new = Placement(slot_to_expert_LS=chosen_LS, layers=old.layers, num_experts=old.num_experts, ranks=old.ranks)
        changes = changes_between(old, new)
        self._history.append(
            Rebalanced(
                at_pass=self._passes,
                reason="" if proposal is None else proposal.reason,
                gain_frac=None if proposal is None else proposal.gain_frac,
                moved_experts=sum(len(change.arrivals) for change in changes),
                changed_layers=len(changes),
                moves=tuple(
                    (old.layers[change.layer], arrival.expert, arrival.from_rank, arrival.to_rank)
                    for change in changes
                    for arrival in change.arrivals
                ),
            )
        )
        self._migration.begin(new)
        self._is_settled = False

    def _look(self) -> None:
        """All ranks: tell what the window was like; rank 0 hands it to the policy."""
        window = self._window(self._exchanged())
        if self._group.is_first:
            self._asked.append(self._thread.submit(self._planner.propose, window))
        self._is_settled = True

    def _exchanged(self) -> WindowNews:
        """What all ranks tell of the passes since the last time."""
        records, counts_LE = self._layers.records, self._layers.counts_LE
        assert records is not None, "ranks are watched"
        assert counts_LE is not None, "ranks are watched"
        layers, experts = counts_LE.shape
        most = 2 * self._policy.interval * layers  # twice in a pass in halves
        mine = told(records, counts_LE, most_records=most, move_s=self._migration.move_s)
        self._layers.records = []
        counts_LE[:] = 0
        told_RN = self._group.all_gather(torch.from_numpy(mine).to(self._group.device)).cpu().numpy()
        news = heard(told_RN, layers=layers, experts=experts, last_pass=self._passes)
        self.figures.append(news.figures)
        return news

    def _window(self, news: WindowNews) -> Window:
        return Window(
            load_LE=news.load_LE,
            steps=self._policy.interval,
            times=news.times,
            current_LS=self._migration.placement.slot_to_expert_LS.astype(np.int64),
            is_settled=self._is_settled,
            move_s=news.move_s,
        )


def _rehearse(planner: Planner, window: Window) -> None:
    """Makes a policy's loops compile before they are asked in earnest."""
    for _ in range(_REHEARSED):
        planner.propose(window)


def _any_window(placement: Placement) -> Window:
    """Of the shapes that windows will have."""
    current_LS = placement.slot_to_expert_LS.astype(np.int64)
    rows_NR = np.ones((len(current_LS), placement.ranks))
    return Window(
        load_LE=np.ones((len(current_LS), placement.num_experts)),
        steps=1,
        times=Times(tokens_NR=4 * rows_NR, active_NR=rows_NR, seconds_NR=rows_NR * np.arange(1, placement.ranks + 1)),
        current_LS=current_LS,
    )


def _line(change: Rebalanced, figures: Sequence[WindowFigures], interval: int) -> str:
    line = f"pass {change.at_pass}: {change.moved_experts} experts moved in {change.changed_layers} layers"
    line += f", because {change.reason}" if change.reason else ""
    before = [each for each in figures if each.last_pass <= change.at_pass][-1:]
    after = [each for each in figures if each.last_pass >= change.at_pass + 2 * interval][:1]
    if not before or not after:
        return f"{line}; the run ended before it showed"
    line += f"; slowest ranks' experts {format_s(before[0].slowest_s / interval)} a pass before, "
    line += f"{format_s(after[0].slowest_s / interval)} after"
    pairs = before[0].pairs / interval, after[0].pairs / interval
    if max(pairs) > OTHER_WORK * min(pairs):
        line += f" (of other work: {pairs[0]:,.0f} token-expert pairs a pass before, {pairs[1]:,.0f} after)"
    if change.gain_frac is None or change.came_frac is None or change.came_error_frac is None:
        return line
    return (
        f"{line}; {100 * change.gain_frac:.0f} % less predicted, {100 * change.came_frac:.0f} % came "
        f"(± {100 * change.came_error_frac:.0f})"
    )


def _moved(change: Rebalanced) -> str:
    listed = [f"layer {layer}: {expert} from {source} to {to}" for layer, expert, source, to in change.moves[:_LISTED]]
    left = len(change.moves) - len(listed)
    return f"  experts, by rank: {', '.join(listed)}{f', and {left} more (--json lists all)' if left else ''}"
