"""Poise's placement planner behind the signature of vLLM's load-balancing policies (0.33.0); vLLM itself is not imported.

The same on every rank: it depends on the load, the old map and settings that are fixed for a run, on nothing else. It starts
from the old map, so that few experts move. Without a machine that fits, or where ranks' settings differ, vLLM's own policy
decides, with one warning.
Letters: L MoE layers, E logical experts, P physical experts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from poise.errors import RanksError, UsageError
from poise.integrations.vllm.expert_log import ExpertLog
from poise.integrations.vllm.settings import Settings
from poise.plan.placement import place_experts
from poise.spec.machine import Machine

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


class Rebalance(Protocol):
    """``AbstractEplbPolicy.rebalance_experts`` of vLLM 0.33.0."""

    def __call__(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class SpeedAwareRebalance:
    """A ``Rebalance``. ``default``: vLLM's own. ``log``: where loads go; None on all ranks but the first. ``difference``:
    given their number, why the ranks may not each plan by itself, or None; asked once for each number."""

    def __init__(
        self,
        settings: Settings,
        *,
        default: Rebalance,
        log: ExpertLog | None,
        difference: Callable[[int], str | None],
    ) -> None:
        self._settings = settings
        self._difference = functools.cache(difference)
        self._default = default
        self._log = log
        self._is_told = False
        self._is_warm = False

    def __call__(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``weight``: (L, E) tokens in the window, all ranks. Returns the expert of every slot, int64 (L, ``num_replicas``)."""
        load_LE = weight.to("cpu", torch.float64).numpy()
        if self._log is not None:
            self._log.add(load_LE)
        old_LP = _usable(old_global_expert_indices, (len(load_LE), num_replicas), load_LE.shape[1])
        machine = self._settings.machine
        try:
            difference = self._difference(num_ranks)
            if machine is None:
                raise UsageError(self._settings.problem or "there is no machine")
            if difference is not None:
                raise RanksError(f"the ranks do not plan from the same settings: {difference}")
            if not load_LE.any():
                if not self._is_warm:  # vLLM's profile run, before there are requests that would wait for the compiler
                    self._is_warm = True
                    skewed_LE = np.ones_like(load_LE) * np.arange(1, load_LE.shape[1] + 1)
                    for current_LP in (None, old_LP):
                        self._planned(skewed_LE, machine, num_replicas, num_groups, num_nodes, num_ranks, current_LP)
                return torch.from_numpy(_contiguous(load_LE, num_replicas) if old_LP is None else old_LP)
            return torch.from_numpy(
                self._planned(load_LE, machine, num_replicas, num_groups, num_nodes, num_ranks, old_LP)
            )
        except UsageError as error:
            if not self._is_told:
                self._is_told = True
                logger.warning("Poise does not place experts, vLLM's own policy does: %s", error)
        return self._default(weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices)

    def _planned(
        self,
        load_LE: npt.NDArray[np.float64],
        machine: Machine,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_LP: Ints | None,
    ) -> Ints:
        has_groups = num_nodes > 1 and num_groups > 1 and num_groups % num_nodes == 0
        plan = place_experts(
            load_LE,
            machine,
            ranks=num_ranks,
            slots_per_rank=num_replicas // num_ranks,
            shape=self._settings.shape,
            steps=self._settings.window_steps,
            current=old_LP,
            max_moves=None if old_LP is None else self._settings.max_moves,
            ranks_per_node=num_ranks // num_nodes,
            expert_groups=num_groups if has_groups else None,
        )
        return np.ascontiguousarray(plan.slot_to_expert_LS, dtype=np.int64)


def _usable(old: torch.Tensor | None, shape: tuple[int, int], num_experts: int) -> Ints | None:
    """The old map, where it is one of the same size that places every expert (a group of ranks may just have changed)."""
    if old is None or tuple(old.shape) != shape:
        return None
    old_LP = old.to("cpu", torch.int64).numpy().copy()
    if old_LP.min() < 0 or old_LP.max() >= num_experts:
        return None
    is_whole = all(np.count_nonzero(np.bincount(row_P, minlength=num_experts)) == num_experts for row_P in old_LP)
    return old_LP if is_whole else None


def _contiguous(load_LE: npt.NDArray[np.float64], num_replicas: int) -> Ints:
    return np.tile(np.arange(num_replicas, dtype=np.int64) % load_LE.shape[1], (len(load_LE), 1))
