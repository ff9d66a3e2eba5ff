"""What this process takes and may take of the machine's memory, as the kernel counts it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from poise.units import KIB, MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Numbers of malloc.h."""

_KEPT_BYTES = 8 * MIB
_NEAR_BYTES = 4 * _KEPT_BYTES
_REGROWN_BYTES = 4 * MIB
"""How far below its ceiling a process begins to give freed memory back, and by how much it grows before it does so again."""
AUTO_MARGIN_FRAC = 0.1
"""Share of the free memory that an automatic budget leaves alone."""


def resident_bytes() -> int:
    """Resident set of this process now. Takes some 10 us."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE


def peak_resident_bytes() -> int:
    """Largest resident set since the start, or since the last ``reset_peak``."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Starts the peak anew; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int:
    """Memory this process can still take: what the machine has, or less where a memory cgroup says so."""
    machine = next(
        int(line.split()[1]) * KIB
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return min([machine, *_cgroup_rooms()])


def automatic_budget_bytes() -> int:
    """The budget of ``memory="auto"``: what is available, less a margin."""
    return int(available_bytes() * (1.0 - AUTO_MARGIN_FRAC))


def return_freed_memory() -> None:
    """Has glibc give large blocks back to the system when they are freed, instead of keeping them for later.

    It would otherwise raise its threshold to 32 MiB after the first large block, and what a budget counts once would stay.
    Blocks up to ``_KEPT_BYTES`` are reused: taking an expert's activations from the system anew for every use cost a tenth to
    a fifth of a prefill's time in page faults.
    Does nothing where the C library has no ``mallopt``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)
    mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Gives freed memory back that lies between blocks in use; nothing where the C library has no ``malloc_trim``."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


class Ceiling:
    """The resident set that a process shall stay below: near it, freed memory goes back to the system instead of waiting.

    Blocks of 1 to 8 MiB come and go on several threads, and which of them lies between two others is chance: the same run
    left 19 to 60 MB of the heap free and resident. ``limit_bytes``: the most that may be resident.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._from_bytes = limit_bytes - _NEAR_BYTES
        self._again_bytes = self._from_bytes

    def keep(self) -> None:
        """Between two steps of a pass, 10 us: gives freed memory back where the resident set is near the ceiling.

        Then again only when it has grown again, so that a plan that fills its budget pays for what it frees and no more.
        """
        if resident_bytes() < self._again_bytes:
            return
        give_back_freed_memory()
        self._again_bytes = max(self._from_bytes, resident_bytes() + _REGROWN_BYTES)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * KIB
    raise AssertionError(f"the kernel reports no {field}")


def _cgroup_rooms() -> list[int]:
    """Room left in every memory cgroup (v1 or v2) this process is in; reclaimable page cache counts as room."""
    rooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit_name, usage_name = Path("/sys/fs/cgroup" + path), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = Path("/sys/fs/cgroup/memory" + path)
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        try:
            limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
            cached = _cached_bytes((folder / "memory.stat").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            rooms.append(max(0, int(limit) - usage + cached))
    return rooms


def _cached_bytes(stat: str) -> int:
    fields = dict(line.split() for line in stat.splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
