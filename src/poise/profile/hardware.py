"""What this machine is, as the operating system says. Imports no torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """From ``/proc/cpuinfo``; some ARM kernels give no name there, then the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
