"""Watches the ranks while they run, and gives them another placement when the policy says so.

Every ``interval`` passes all ranks tell each other where tokens went and how fast experts were. Rank 0 asks the policy, on a
thread of its own; when there is a proposal it says so in an agreement, and all ranks begin to move experts before that pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from poise.parallel.changes import changes_between
from poise.parallel.group import RankGroup
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers, LayerRecord
from poise.plan.observed_costs import ObservedCost, fit
from poise.plan.rebalance import Proposal, Rebalance, Window
from poise.spec.placement import Placement
from poise.units import format_s

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebalanced:
    """One change of the placement: before which pass it began, why, what was expected of it, what moved."""

    at_pass: int
    reason: str
    gain_frac: float | None
    moved_experts: int
    changed_layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowFigures:
    """What a window of passes was like. ``imbalance``: most tokens of a rank over the mean, mean over layers;
    ``expert_s_R``: time in experts of each rank, ``waited_s_R``: waiting for the last one; ``sent_bytes``: by all."""

    last_pass: int
    imbalance: float
    expert_s_R: tuple[float, ...]
    waited_s_R: tuple[float, ...]
    sent_bytes: int


class Balancing:
    """``step`` is called on all ranks before each pass; ``has_proposal`` goes into this rank's part of the agreement."""

    def __init__(self, group: RankGroup, layers: ExpertParallelLayers, migration: Migration, policy: Rebalance) -> None:
        self._group = group
        self._layers = layers
        self._migration = migration
        self._policy = policy
        self._passes = 0
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="poise-planner")
        self._pending: Future[Proposal | None] | None = None
        layers.records = []
        layers.counts_LE = np.zeros((len(layers.copies_L), migration.placement.num_experts), dtype=np.int64)
        if group.is_first:
            self._planner.submit(
                policy.propose, _any_window(migration.placement, group.num_ranks)
            )  # compiles its loops
        self.history: list[Rebalanced] = []
        """On all ranks alike."""
        self.figures: list[WindowFigures] = []

    @property
    def has_proposal(self) -> bool:
        """On rank 0: whether a proposal is ready to begin with. Raises what broke the planner."""
        if self._pending is None or not self._pending.done() or not self._migration.is_idle:
            return False
        if self._pending.result() is None:
            self._pending = None
            return False
        return True

    def step(self, *, proposed: bool) -> None:
        """Before a pass. ``proposed``: what rank 0 said of ``has_proposal`` in this agreement."""
        if proposed:
            self._begin()
        if self._passes and self._passes % self._policy.interval == 0:
            self._look()
        self._passes += 1

    def table(self) -> list[str]:
        """A line for each change: when, what moved, why, and what the slowest rank's experts took before and after."""
        return [_line(change, self.figures, self._policy.interval) for change in self.history]

    def close(self) -> None:
        """Ends the planner's thread."""
        self._planner.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        """All ranks: learn the new placement from rank 0, and begin to move."""
        old = self._migration.placement
        shape = old.slot_to_expert_LS.shape
        proposal: Proposal | None = None
        mine = torch.zeros(shape, dtype=torch.int64)
        if self._group.is_first:
            assert self._pending is not None, "rank 0 has a proposal"
            proposal = self._pending.result()
            assert proposal is not None, "rank 0 has a proposal"
            self._pending = None
            mine = torch.from_numpy(np.ascontiguousarray(proposal.slot_to_expert_LS, dtype=np.int64))
        chosen_LS = self._group.all_gather(mine.to(self._group.device))[0].cpu().numpy().astype(np.int32)
        new = Placement(slot_to_expert_LS=chosen_LS, layers=old.layers, num_experts=old.num_experts, ranks=old.ranks)
        changes = changes_between(old, new)
        self.history.append(
            Rebalanced(
                at_pass=self._passes,
                reason="" if proposal is None else proposal.reason,
                gain_frac=None if proposal is None else proposal.gain_frac,
                moved_experts=sum(len(change.arrivals) for change in changes),
                changed_layers=len(changes),
            )
        )
        self._migration.begin(new)

    def _look(self) -> None:
        """All ranks: tell what the window was like; rank 0 asks the policy unless it is thinking, or experts are moving."""
        records, counts_LE = self._layers.records, self._layers.counts_LE
        assert records is not None, "ranks are watched"
        assert counts_LE is not None, "ranks are watched"
        self._layers.records = []
        told = np.concatenate([counts_LE.ravel().astype(float), _summary(records, len(counts_LE))])
        counts_LE[:] = 0
        heard_RN = self._group.all_gather(torch.from_numpy(told).to(self._group.device)).cpu().numpy()
        load_LE = heard_RN[:, : counts_LE.size].sum(axis=0).reshape(counts_LE.shape)
        summaries = [_Summary.of(row, len(counts_LE)) for row in heard_RN[:, counts_LE.size :]]
        self.figures.append(_figures(summaries, self._passes))
        if self._group.is_first and self._pending is None and self._migration.is_idle:
            window = Window(
                load_LE=load_LE,
                steps=self._policy.interval,
                costs_R=tuple(each.cost for each in summaries),
                current_LS=self._migration.placement.slot_to_expert_LS.astype(np.int64),
            )
            self._pending = self._planner.submit(self._policy.propose, window)


def _any_window(placement: Placement, num_ranks: int) -> Window:
    """Of the shapes that windows will have."""
    current_LS = placement.slot_to_expert_LS.astype(np.int64)
    load_LE = np.ones((len(current_LS), placement.num_experts))
    cost = ObservedCost(expert_s=1e-3, token_s=1e-6)
    return Window(load_LE=load_LE, steps=1, costs_R=(cost,) * num_ranks, current_LS=current_LS)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Summary:
    """One rank's window. ``pairs_L``: (token, expert) pairs it computed."""

    cost: ObservedCost | None
    expert_s: float
    waited_s: float
    sent_bytes: float
    pairs_L: Any

    @classmethod
    def of(cls, told: Any, layers: int) -> _Summary:
        expert_s, token_s, has_cost, compute_s, waited_s, sent_bytes = told[: len(told) - layers].tolist()
        cost = ObservedCost(expert_s=expert_s, token_s=token_s) if has_cost else None
        return cls(
            cost=cost, expert_s=compute_s, waited_s=waited_s, sent_bytes=sent_bytes, pairs_L=told[len(told) - layers :]
        )


def _summary(records: Sequence[LayerRecord], layers: int) -> Any:
    """A rank's window as numbers that travel: what ``_Summary.of`` reads."""
    cost = fit(
        [each.routed_tokens for each in records],
        [each.active_experts for each in records],
        [each.compute_s for each in records],
    )
    pairs_L = np.bincount(
        [each.layer for each in records], weights=[each.routed_tokens for each in records], minlength=layers
    )
    sums = [sum(getattr(each, name) for each in records) for name in ("compute_s", "waited_s", "sent_bytes")]
    line = [0.0, 0.0, 0.0] if cost is None else [cost.expert_s, cost.token_s, 1.0]
    return np.concatenate([line, sums, pairs_L])


def _figures(summaries: Sequence[_Summary], passes: int) -> WindowFigures:
    pairs_RL = np.stack([each.pairs_L for each in summaries])
    mean_L = pairs_RL.mean(axis=0)
    ratio_L = pairs_RL.max(axis=0)[mean_L > 0] / mean_L[mean_L > 0]
    return WindowFigures(
        last_pass=passes,
        imbalance=float(ratio_L.mean()) if len(ratio_L) else 1.0,
        expert_s_R=tuple(each.expert_s for each in summaries),
        waited_s_R=tuple(each.waited_s for each in summaries),
        sent_bytes=int(sum(each.sent_bytes for each in summaries)),
    )


def _line(change: Rebalanced, figures: Sequence[WindowFigures], interval: int) -> str:
    line = f"pass {change.at_pass}: {change.moved_experts} experts moved in {change.changed_layers} layers"
    line += f", because {change.reason}" if change.reason else ""
    before = [each for each in figures if each.last_pass <= change.at_pass][-1:]
    after = [each for each in figures if each.last_pass >= change.at_pass + 2 * interval][:1]
    if not before or not after:
        return f"{line}; the run ended before it showed"
    return f"{line}; slowest rank's experts {_slowest(before[0], interval)} a pass before, {_slowest(after[0], interval)} after"


def _slowest(figures: WindowFigures, interval: int) -> str:
    return format_s(max(figures.expert_s_R) / interval)
