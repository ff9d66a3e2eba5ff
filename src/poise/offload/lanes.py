"""How bytes get onto a device while it computes, and how copies and compute wait for each other there.

On a GPU copies run on a stream of their own out of pinned memory; a copy and the compute that needs it are ordered by events
on the device, and the host waits for neither. On the CPU, where a small device is played by ordinary memory, a copy is done
when ``copy`` returns and nothing has to wait. ``copy`` and ``host_waits`` are for the copying thread, all else for the one that
computes. The memory copied into belongs to the caller, who keeps it until the device is idle: no allocator need be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from poise.units import MIB

PIECE_BYTES = 32 * MIB
"""A copy is cut into pieces of this: a small one of the compute thread's own would else wait behind a whole expert."""

Mark = Any
"""A point in the device's work; None: whatever it stands for has already happened."""
Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Where to and from, uint8 of shape (bytes,)."""


class Lane(Protocol):
    """One way onto one device."""

    def copy(self, copies: Copies, *, after: Mark) -> Mark:
        """Begins to copy when ``after`` has happened; returns the mark of its end."""
        ...

    def now(self) -> Mark:
        """All that compute has been told to do so far."""
        ...

    def compute_waits(self, mark: Mark) -> None:
        """What compute is told to do from now on happens after ``mark``."""
        ...

    def host_waits(self, mark: Mark) -> None:
        """Until ``mark`` has happened."""
        ...

    def settle(self) -> None:
        """Until the device is idle, and has given back the memory that nobody holds."""
        ...


class CpuLane:
    """Ordinary memory plays the device."""

    def copy(self, copies: Copies, *, after: Mark) -> Mark:
        """Copies."""
        for into, source in copies:
            into.copy_(source)

    def now(self) -> Mark:
        """Compute does what it is told at once."""

    def compute_waits(self, mark: Mark) -> None:
        """It has happened."""

    def host_waits(self, mark: Mark) -> None:
        """It has happened."""

    def settle(self) -> None:
        """It is idle."""


class CudaLane:
    """A stream beside the one that computes. What is copied from must be pinned, else the host waits in ``copy``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, copies: Copies, *, after: Mark) -> Mark:
        """Queues the copies behind those before."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for into, source in copies:
                for to_piece, from_piece in zip(_pieces(into), _pieces(source), strict=True):
                    to_piece.copy_(from_piece, non_blocking=True)
            return _recorded(self._stream)

    def now(self) -> Mark:
        """An event behind what is queued on the stream that computes."""
        return _recorded(torch.cuda.current_stream(self._device))

    def compute_waits(self, mark: Mark) -> None:
        """The stream that computes waits; the host does not."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def host_waits(self, mark: Mark) -> None:
        """Sleeps until the event."""
        if mark is not None:
            mark.synchronize()

    def settle(self) -> None:
        """Waits for all streams; memory that torch's allocator keeps for later goes back to the device."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def lane_to(device: torch.device) -> Lane:
    """The way onto a device of this host."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _pieces(memory_B: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(memory_B, PIECE_BYTES))
