"""Control groups of the kernel: where this machine has them, and one group of our own with limits.

Version 1 (a hierarchy per controller) and version 2 (one for all) behind the same few functions. A group is made as
high in the hierarchy as possible without leaving a limit that already holds for this process. Our groups carry the
process id of their maker, so that those of a killed run are found and removed. A missing privilege is an ``OSError``
here; ``limits.py`` turns it into words. Nothing is ever mounted or changed outside our own groups, except that
version 2 may be told to enable a controller for the children of the group that holds ours.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poise.profile.mounts import Mount, mounts

Controller = Literal["memory", "io", "cpu"]

_PREFIX = "poise"
_V1_NAMES = {"memory": "memory", "io": "blkio", "cpu": "cpu"}
_V1_UNLIMITED_BYTES = 1 << 62
_PERIOD_US = 5_000
_MIN_QUOTA_US = 1_000
"""The kernel's own minimum. A short period makes a process slow, a long one makes it stutter."""
_REMOVE_WITHIN_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """A mounted controller. ``own`` is the group of this process, below ``mount`` or equal to it."""

    controller: Controller
    version: int
    mount: Path
    own: Path


def find_hierarchy(controller: Controller) -> Hierarchy | None:
    """Where ``controller`` is mounted, in whichever version this machine has; None where it is not."""
    for mount in mounts():
        name = _V1_NAMES[controller]
        if mount.kind == "cgroup" and name in mount.options:
            return Hierarchy(controller=controller, version=1, mount=mount.point, own=_own_group(mount, name))
        if mount.kind == "cgroup2" and controller in _read_words(mount.point / "cgroup.controllers"):
            return Hierarchy(controller=controller, version=2, mount=mount.point, own=_own_group(mount, ""))
    return None


def make_group(hierarchy: Hierarchy) -> Path:
    """A new, empty group of ours. Raises OSError where that is not permitted."""
    refusal: OSError | None = None
    for place in _places(hierarchy):
        try:
            enable(hierarchy, place)
            return _make_below(place)
        except OSError as error:
            refusal = error
    assert refusal is not None, "there is always at least the process's own group to try"
    raise refusal


def enable(hierarchy: Hierarchy, place: Path) -> None:
    """Make the controller work in groups directly below ``place``: version 2 wants to be told."""
    switch = place / "cgroup.subtree_control"
    if hierarchy.version == 2 and hierarchy.controller not in _read_words(switch):
        switch.write_text(f"+{hierarchy.controller}")


def limit_memory(hierarchy: Hierarchy, group: Path, size_bytes: int) -> None:
    """Bound everything charged to ``group``, page cache included; swap gives no way around it."""
    if hierarchy.version == 1:
        (group / "memory.limit_in_bytes").write_text(str(size_bytes))
        swap, value = group / "memory.memsw.limit_in_bytes", str(size_bytes)
    else:
        (group / "memory.max").write_text(str(size_bytes))
        swap, value = group / "memory.swap.max", "0"
    if swap.exists():
        swap.write_text(value)


def limit_reads(hierarchy: Hierarchy, group: Path, device: str, bytes_per_s: int) -> None:
    """Throttle what ``group`` reads from ``device`` (``"254:0"``)."""
    if hierarchy.version == 1:
        (group / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_s}")
    else:
        (group / "io.max").write_text(f"{device} rbps={bytes_per_s}")


def period_s(cores: float) -> float:
    """How often a group with the time of so many cores gets its share."""
    return max(_PERIOD_US, round(_MIN_QUOTA_US / cores)) / 1e6


def limit_cpu(hierarchy: Hierarchy, group: Path, cores: float) -> None:
    """Give ``group`` the time of so many cores (0.4: two milliseconds of every five), now or while it runs."""
    assert cores > 0, f"a share of processor time is positive, not {cores}"
    period_us = round(1e6 * period_s(cores))
    quota_us = max(_MIN_QUOTA_US, round(cores * period_us))
    if hierarchy.version == 1:
        (group / "cpu.cfs_period_us").write_text(str(period_us))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
    else:
        (group / "cpu.max").write_text(f"{quota_us} {period_us}")


def let_out(hierarchy: Hierarchy, thread: int) -> None:
    """Move one thread of a limited process to the group of this one. Raises OSError with version 2, which moves whole
    processes only."""
    if hierarchy.version != 1:
        raise OSError(errno.EOPNOTSUPP, "version 2 moves whole processes only", str(hierarchy.own))
    (hierarchy.own / "tasks").write_text(str(thread))


def throttled_s(hierarchy: Hierarchy, group: Path) -> float:
    """How long processes of ``group`` were ready to run and not allowed to."""
    counts = dict(line.split(" ", 1) for line in (group / "cpu.stat").read_text().splitlines())
    return int(counts["throttled_time"]) / 1e9 if hierarchy.version == 1 else int(counts["throttled_usec"]) / 1e6


def peak_bytes(hierarchy: Hierarchy, group: Path) -> int | None:
    """The most that was ever charged to ``group``; None on kernels before 5.19 with version 2, which do not say."""
    peak = group / ("memory.max_usage_in_bytes" if hierarchy.version == 1 else "memory.peak")
    return int(peak.read_text()) if peak.exists() else None


def oom_kills(hierarchy: Hierarchy, group: Path) -> int:
    """How many processes of ``group`` the kernel killed because its memory limit was reached."""
    events = group / ("memory.oom_control" if hierarchy.version == 1 else "memory.events")
    counts = dict(line.split(" ", 1) for line in events.read_text().splitlines())
    return int(counts.get("oom_kill", "0"))


def remove_group(group: Path) -> None:
    """Kill what still runs in ``group`` and remove it. Raises OSError if it does not go."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while True:
        for pid in _read_words(group / "cgroup.procs"):
            if pid != "0":  # a process of another pid namespace
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def remove_stale_groups(hierarchy: Hierarchy) -> tuple[Path, ...]:
    """Remove groups of earlier runs whose process is gone, with what they left running; returns those removed."""
    removed = []
    for place in _places(hierarchy):
        for group in sorted(place.glob(f"{_PREFIX}-{_pid_namespace()}-*")):
            pid = int(group.name.split("-")[2])
            if not _alive(pid):
                with suppress(OSError):
                    remove_group(group)
                    removed.append(group)
    return tuple(removed)


def _own_group(mount: Mount, name: str) -> Path:
    """From ``/proc/self/cgroup``: lines ``id:controllers:/path``, version 2 with no controllers named."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if name in names.split(",") and path.startswith(mount.root):
            own = mount.point / path.removeprefix(mount.root).lstrip("/")
            return own if own.is_dir() else mount.point
    return mount.point


def _places(hierarchy: Hierarchy) -> tuple[Path, ...]:
    """Groups that may hold ours, the highest first."""
    chain = [hierarchy.own]
    while chain[-1] != hierarchy.mount and not _has_limit(chain[-1]):
        chain.append(chain[-1].parent)
    return tuple(reversed(chain))


def _has_limit(group: Path) -> bool:
    """Whether ``group`` bounds memory, reads or processor time."""
    v1_memory = group / "memory.limit_in_bytes"
    if v1_memory.exists() and int(v1_memory.read_text()) < _V1_UNLIMITED_BYTES:
        return True
    v1_quota = _read_words(group / "cpu.cfs_quota_us")
    if v1_quota and v1_quota[0] != "-1":
        return True
    settings = [_read_words(group / name) for name in ("memory.max", "memory.high", "cpu.max")]
    throttles = [_read_words(group / name) for name in ("blkio.throttle.read_bps_device", "io.max")]
    return any(words and words[0] != "max" for words in settings) or any(throttles)


def _make_below(place: Path) -> Path:
    number = 0
    while True:
        group = place / f"{_PREFIX}-{_pid_namespace()}-{os.getpid()}-{number}"
        try:
            group.mkdir()
        except FileExistsError:
            number += 1
        else:
            return group


def _pid_namespace() -> str:
    """Process ids mean something only within their namespace, so the name of a group says which."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _read_words(path: Path) -> list[str]:
    """The words of a small kernel file; none if it is not there or may not be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
