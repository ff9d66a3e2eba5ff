"""How much processor time this rank may use, as the kernel says, and whether all ranks can look ahead on a thread beside."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch

from poise.parallel.group import RankGroup
from poise.plan.spare_cores import RankCores, can_look_aside

_GROUPS = Path("/sys/fs/cgroup")


def all_can_look_aside(group: RankGroup) -> bool:
    """All ranks at once: the same answer on all."""
    group.put(f"cores/{group.rank}", json.dumps(asdict(own_cores(group.device))))
    told_R = [json.loads(group.hear(f"cores/{rank}")) for rank in range(group.num_ranks)]
    return can_look_aside([RankCores(**{**told, "cores": tuple(told["cores"])}) for told in told_R])


def own_cores(device: torch.device) -> RankCores:
    """``device``: where this rank computes; one thread feeds a GPU."""
    return RankCores(
        host=_host(),
        cores=tuple(sorted(_affinity())),
        quotas=_quotas(),
        threads=torch.get_num_threads() if device.type == "cpu" else 1,
    )


def _affinity() -> Collection[int]:
    """Linux tells; elsewhere all there are."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _quotas() -> dict[str, float]:
    """Of this process's control group (version 1 or 2) and all above it that have one, as far as they can be seen."""
    quotas = {}
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = _GROUPS / "cpu" if controllers else _GROUPS
        own = mount / path.lstrip("/")
        own = own if own.is_dir() else mount  # seen from a namespace of its own
        for folder in (own, *own.parents):
            cores = _quota(folder)
            if cores is not None:
                found = folder.stat()
                quotas[f"{found.st_dev}:{found.st_ino}"] = cores
            if folder == mount:
                break
    return quotas


def _quota(folder: Path) -> float | None:
    words = [word for line in _lines(folder / "cpu.max") for word in line.split()]
    words = words or [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
