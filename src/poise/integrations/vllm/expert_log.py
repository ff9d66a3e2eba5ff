"""The loads that vLLM's load balancer saw, kept in a file that ``poise place --trace`` reads.

A window is the load that vLLM hands to its policy, as mean tokens of a step. The file holds the latest windows and is
written whole at each one, by rank 0 only. A load without tokens (vLLM's profile run) is not one.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt

from poise.errors import TraceError
from poise.spec.statistics import write_expert_log

logger = logging.getLogger(__name__)

KEPT_WINDOWS = 64


class ExpertLog:
    """Windows of one model; those of another shape (a draft model) are left out, and the first is warned of."""

    def __init__(self, path: Path, *, window_steps: int) -> None:
        self.path = path
        self._window_steps = window_steps
        self._windows: deque[npt.NDArray[np.float32]] = deque(maxlen=KEPT_WINDOWS)
        self._is_told = False

    def add(self, load_LE: npt.NDArray[np.float64]) -> None:
        """``load_LE``: tokens of each expert, summed over the window. A file that cannot be written is warned of once."""
        if not load_LE.any():
            return
        if self._windows and self._windows[0].shape != load_LE.shape:
            self._tell("loads of the shape %s are not logged; the log is of %s", load_LE.shape, self._windows[0].shape)
            return
        self._windows.append((load_LE / self._window_steps).astype(np.float32))
        try:
            write_expert_log(self.path, np.stack(self._windows), engine="vLLM", window_steps=self._window_steps)
        except TraceError as error:
            self._tell("loads are not logged: %s", error)

    def _tell(self, message: str, *values: object) -> None:
        if not self._is_told:
            self._is_told = True
            logger.warning(message, *values)
