"""The control groups of one child: what is limited in them, and why a limit could not be set.

A limit that cannot be set (no privilege, no controller) is no error here: the reason comes back in words, and whoever
measures marks the result. The groups are fresh; ``close`` kills what is left in them and removes them. Those that a
killed run has left are removed when the first new one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from poise.bench import cgroup
from poise.profile.mounts import block_device


class ControlGroups:
    """One group for each hierarchy that is needed; with version 2, all limits share one."""

    def __init__(self) -> None:
        self._groups: dict[Path, Path] = {}
        """Mount point of a hierarchy to our group in it."""
        self._limited: dict[cgroup.Controller, tuple[cgroup.Hierarchy, Path]] = {}

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files to which a child writes its process id to join."""
        return tuple(group / "cgroup.procs" for group in self._groups.values())

    def limit_memory(self, size_bytes: int) -> str | None:
        """Bound memory, page cache included; returns why it could not be, or None."""
        return self._limit(
            "memory", "memory", lambda hierarchy, group: cgroup.limit_memory(hierarchy, group, size_bytes)
        )

    def limit_reads(self, bytes_per_s: int, path: Path) -> str | None:
        """Throttle reads of the disk that holds ``path``; returns why they could not be, or None."""
        device, reason = block_device(path)
        if device is None:
            return reason
        return self._limit(
            "io", "block-I/O", lambda hierarchy, group: cgroup.limit_reads(hierarchy, group, device, bytes_per_s)
        )

    def limit_cpu(self, cores: float) -> str | None:
        """Give so many cores' time, now or while the child runs; returns why it could not be limited, or None."""
        return self._limit("cpu", "processor", lambda hierarchy, group: cgroup.limit_cpu(hierarchy, group, cores))

    def let_out(self, thread: int) -> str | None:
        """Free one thread of the child from the limit of processor time; returns why it could not be, or None."""
        limited = self._limited.get("cpu")
        try:
            if limited is not None:
                cgroup.let_out(limited[0], thread)
        except OSError as error:
            return _refusal(error)
        return None

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that was ever charged, page cache included; None where memory is not limited."""
        limited = self._limited.get("memory")
        return None if limited is None else cgroup.peak_bytes(*limited)

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the kernel killed a process because the memory limit was reached."""
        limited = self._limited.get("memory")
        return limited is not None and cgroup.oom_kills(*limited) > 0

    @property
    def throttled_s(self) -> float | None:
        """How long the child was ready to run and not allowed to; None where processor time is not limited."""
        limited = self._limited.get("cpu")
        return None if limited is None else cgroup.throttled_s(*limited)

    def close(self) -> None:
        """Kills what still runs in the groups and removes them. Safe to call twice."""
        self._limited.clear()
        groups, self._groups = list(self._groups.values()), {}
        with ExitStack() as last_first:
            for group in groups:
                last_first.callback(cgroup.remove_group, group)

    def _limit(
        self, controller: cgroup.Controller, name: str, limit: Callable[[cgroup.Hierarchy, Path], None]
    ) -> str | None:
        hierarchy = cgroup.find_hierarchy(controller)
        if hierarchy is None:
            return f"this machine has no {name} control group mounted"
        try:
            group = self._group_in(hierarchy)
            limit(hierarchy, group)
        except OSError as error:
            return _refusal(error)
        self._limited[controller] = hierarchy, group
        return None

    def _group_in(self, hierarchy: cgroup.Hierarchy) -> Path:
        group = self._groups.get(hierarchy.mount)
        if group is None:
            cgroup.remove_stale_groups(hierarchy)
            self._groups[hierarchy.mount] = group = cgroup.make_group(hierarchy)
        else:
            cgroup.enable(hierarchy, group.parent)
        return group


def _refusal(error: OSError) -> str:
    remedy = "; run as root, or in a group delegated to you" if isinstance(error, PermissionError) else ""
    return f"{error.filename or 'the control group'} refuses ({error.strerror}){remedy}"
