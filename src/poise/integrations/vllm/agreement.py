"""Whether all ranks plan from the same: each plans by itself, and a rank that plans otherwise reads wrong weights.

Ranks compare a fingerprint through the process group's key-value store, not by a collective: vLLM may call its policy from a
thread of its own, beside the collectives of the model. The first verdict that is written holds for all ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import timedelta
from importlib import metadata
from typing import Protocol

import torch.distributed as dist

from poise.integrations.vllm.settings import Settings
from poise.profile.hardware import cpu_model

logger = logging.getLogger(__name__)

WAIT_S = 60.0
"""Ranks call the policy at the same point, so that they are seconds apart."""
SAME = "same"


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


def fingerprint(settings: Settings) -> str:
    """Of everything that a plan depends on beside the load and the map: machine, shape, limits, versions, processor."""
    facts = [
        None if settings.machine is None else settings.machine.to_json(),
        str(settings.shape),
        settings.max_moves,
        settings.window_steps,
        [metadata.version(name) for name in ("poise", "numpy", "numba")],
        cpu_model(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def difference_among_ranks(settings: Settings, num_ranks: int) -> str | None:
    """As ``difference``, for the process group of this process. Not compared, and None, where it has other ranks than those
    that hold the experts, or where there is none."""
    own = fingerprint(settings)
    if not dist.is_initialized() or dist.get_world_size() != num_ranks:
        logger.info("Poise plans from %s; not compared: no process group of %d ranks", own, num_ranks)
        return None
    store = dist.distributed_c10d._get_default_store()
    problem = difference(own, store, rank=dist.get_rank(), num_ranks=num_ranks)
    logger.info("Poise plans from %s, %s", own, "the same on all ranks" if problem is None else problem)
    return problem


def difference(own: str, store: Store, *, rank: int, num_ranks: int, wait_s: float = WAIT_S) -> str | None:
    """Why the ranks may not plan by themselves; None where all of them have the fingerprint ``own``. The same on each."""
    keys = [f"poise/plan/{num_ranks}/{other}" for other in range(num_ranks)]
    verdict_key = f"poise/plan/{num_ranks}/verdict"
    store.set(keys[rank], own)
    try:
        store.wait(keys, timedelta(seconds=wait_s))
        values = [store.get(key).decode() for key in keys]
        others = [other for other, value in enumerate(values) if value != own]
        verdict = f"rank {others[0]} differs from rank {rank}" if others else SAME
    except RuntimeError:  # what torch raises when time is up
        verdict = f"rank {rank} waited {wait_s:g} s for the others"
    agreed = str(store.compare_set(verdict_key, "", verdict).decode())
    return None if agreed == SAME else agreed
