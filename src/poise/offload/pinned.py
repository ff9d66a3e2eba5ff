"""Memory that the system may not move, so that a GPU copies out of it by itself, at the full rate of its bus.

An arena's own pages are pinned where they lie: torch's allocator of pinned memory would round sizes up to a power of two, and
give small pages, into which the disk is read two to three times as slowly.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from poise.units import format_bytes

logger = logging.getLogger(__name__)


class Pinned:
    """Pins ``memory_B`` (uint8) until it is closed or dropped, which must be before the memory is given back.

    ``is_pinned``: False where the system does not allow so much; copies are then staged by the driver, which is said once.
    """

    def __init__(self, memory_B: torch.Tensor) -> None:
        address, nbytes = memory_B.data_ptr(), memory_B.nbytes
        status = int(_cudart().cudaHostRegister(address, nbytes, 0))
        self.is_pinned = status == 0
        self._end = weakref.finalize(self, _unregister, address if self.is_pinned else None)
        self._end.atexit = False
        if not self.is_pinned:
            logger.warning(
                "%s of memory cannot be pinned for the GPU (CUDA error %d): copies to it will be slow; give a smaller "
                "--memory, or raise the limit on locked memory (ulimit -l)",
                format_bytes(nbytes),
                status,
            )

    def close(self) -> None:
        """Unpins. Safe to call twice."""
        self._end()


def _unregister(address: int | None) -> None:
    if address is not None:
        _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
