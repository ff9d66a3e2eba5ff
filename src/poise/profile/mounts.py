"""Which file system holds a path, and which block device lies under it, from ``/proc/self/mountinfo``.

Linux only: elsewhere there are no mounts to list, and a path has no known device. Reads; changes nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One mounted file system: the part ``root`` of it appears at ``point``; ``kind`` is ext4, tmpfs, cgroup2, …"""

    root: str
    point: Path
    kind: str
    source: str
    options: tuple[str, ...]


def mounts() -> tuple[Mount, ...]:
    """Everything mounted in this process's view, in mount order; empty where the kernel does not say."""
    if not MOUNTINFO.exists():
        return ()
    return tuple(_parse(line) for line in MOUNTINFO.read_text().splitlines())


def mount_of(path: Path) -> Mount | None:
    """The mount that holds ``path``: the longest mount point above it, the latest of equals."""
    resolved = path.resolve()
    holding = [mount for mount in mounts() if resolved.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def in_memory(path: Path) -> bool:
    """Whether ``path`` lies on a file system that is memory, such as a ``/tmp`` of kind tmpfs."""
    mount = mount_of(path)
    return mount is not None and mount.kind in MEMORY_FILE_SYSTEMS


def block_device(path: Path) -> tuple[str | None, str]:
    """``("254:0", "")``: the whole disk under ``path``, as control groups name it; else None and the reason."""
    device = os.stat(path).st_dev
    if os.major(device) == 0:  # btrfs, overlay and the like number their volumes themselves
        mount = mount_of(path)
        if mount is None or not mount.source.startswith("/dev/"):
            return None, f"{path} lies on {mount.kind if mount else 'an unknown file system'}, which names no disk"
        device = os.stat(mount.source).st_rdev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        return None, f"the disk under {path} is not visible in {entry.parent}"
    disk = entry.resolve()
    if (disk / "partition").exists():
        disk = disk.parent
    return (disk / "dev").read_text().strip(), ""


def _parse(line: str) -> Mount:
    """A line of mountinfo(5): fields, optional tags, `` - ``, then type, source and options."""
    left, right = line.split(" - ", 1)
    fields, (kind, source, options) = left.split(" "), right.split(" ", 2)
    return Mount(
        root=_unescape(fields[3]),
        point=Path(_unescape(fields[4])),
        kind=kind,
        source=_unescape(source),
        options=tuple(options.split(",")),
    )


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
