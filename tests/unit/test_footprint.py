"""Near its ceiling a process gives freed memory back; far from it, it keeps it for the next use."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from poise.engine.footprint import Ceiling, resident_bytes, return_freed_memory

MIB = 1 << 20
return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(MIB) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, MIB)
for block in blocks[::2]:
    libc.free(block)
before = resident_bytes()
ceiling = Ceiling(before + int(sys.argv[1]) * MIB)
ceiling.keep()
print((before - resident_bytes()) / MIB)
"""


@pytest.mark.parametrize(("room_mib", "least", "most"), [(4, 28, 40), (200, -4, 4)])
def test_freed_blocks_between_others_go_back_near_the_ceiling_only(room_mib: int, least: float, most: float) -> None:
    script = subprocess.run([sys.executable, "-c", SCRIPT, str(room_mib)], capture_output=True, text=True, check=True)
    assert least <= float(script.stdout) <= most
