"""What moving one expert takes from the experts that compute on this rank: processor time of the thread that moves it.

A processor has no copy engine: whoever fetches or serves a replica does so on the cores of those that compute. Measured over
all that was moved, either way, and told to all ranks, so that a replica is planned only where it saves more than it takes.
"""

from __future__ import annotations

KEEP = 0.9
"""Of what was seen before, for each layer in which something moved."""
DOUBT = 0.998
"""Times what is believed, for each layer in which nothing did: too high a cost would else keep all replicas away for ever."""


class CopyCost:
    """``expert_bytes``: of a replica. ``has_engine``: moving takes no time from experts, whatever it takes."""

    def __init__(self, expert_bytes: int, *, has_engine: bool) -> None:
        self._expert_bytes, self._has_engine = expert_bytes, has_engine
        self._last_s, self._last_bytes = 0.0, 0
        self._seconds = self._bytes = 0.0

    def saw(self, cpu_s: float, moved_bytes: int) -> float:
        """Behind each layer: processor time that the thread has taken, and bytes that it has moved, since it began. Returns
        what was taken from experts since the last time, in seconds."""
        took_s, nbytes = cpu_s - self._last_s, moved_bytes - self._last_bytes
        if nbytes:
            self._seconds = KEEP * self._seconds + took_s
            self._bytes = KEEP * self._bytes + nbytes
        else:
            self._seconds *= DOUBT
        self._last_s, self._last_bytes = cpu_s, moved_bytes
        return 0.0 if self._has_engine else took_s

    @property
    def copy_us(self) -> int:
        """Microseconds of one replica, in or out; 0: none, or not known."""
        if self._has_engine or not self._bytes:
            return 0
        return round(1e6 * self._seconds / self._bytes * self._expert_bytes)
