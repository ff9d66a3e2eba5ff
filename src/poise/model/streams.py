"""A thread's own stream of a GPU, and waiting for what it was given. On a CPU, where work is done when a call returns, nothing.

Torch's default stream is one for all threads, so a thread that works beside the computing one takes a stream of its own.
Tensors that one thread's stream makes and another one's uses are ordered by waiting: who hands them over has settled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def settle(device: torch.device) -> None:
    """Returns when all that this thread gave its stream is done. Other streams are not waited for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Work of this thread runs beside that of others: on a stream of its own, which is settled at the end."""
    stream = new_stream(device)
    if stream is None:
        yield
        return
    torch.cuda.set_device(device)  # of each thread; the first GPU, where it is not set, would get memory of all ranks
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            settle(device)
