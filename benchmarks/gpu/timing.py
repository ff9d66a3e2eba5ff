"""Times on a GPU: of what its streams do, by events, and of what the host waits for, by its clock. Medians, cases in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP, ROUNDS = 3, 25

Job = Callable[[], object]


def device_s(jobs: Mapping[str, Job], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each job from its first kernel to its last, streams that it joins again included. They take turns."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(WARM_UP + rounds):
        for name, job in jobs.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            job()
            ended.record()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                samples[name].append(began.elapsed_time(ended) / 1e3)
    return {name: statistics.median(each) for name, each in samples.items()}


def host_s(jobs: Mapping[str, Job], *, rounds: int = 8 * ROUNDS) -> dict[str, float]:
    """Seconds that a caller takes for each job, until all that it queued is done."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(WARM_UP + rounds):
        for name, job in jobs.items():
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            job()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                samples[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(each) for name, each in samples.items()}
