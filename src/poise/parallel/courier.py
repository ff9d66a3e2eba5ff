"""A thread that does this rank's exchanges, one after the other, while the computing thread goes on.

Exchanges keep the order in which they were handed over, so that all ranks do them in the same order. While any is under way
nobody else may use the group. An error comes out where the outcome is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


class Courier:
    """One thread, from the first exchange until ``close``."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, exchange: Callable[[], T]) -> Future[T]:
        """Hands an exchange over."""
        if self._thread is None:
            self._thread = _started()
        return self._thread.submit(_do, exchange)

    def close(self) -> None:
        """Ends the thread behind the exchange that it is at; the others are not begun. Safe to call twice."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _started() -> ThreadPoolExecutor:
    of_torch = torch.get_num_threads()
    thread = ThreadPoolExecutor(1, thread_name_prefix="poise-courier", initializer=partial(torch.set_num_threads, 1))
    thread.submit(torch.get_num_threads).result()
    torch.set_num_threads(of_torch)  # setting it on a thread may set it for others
    return thread


@torch.inference_mode()
def _do(exchange: Callable[[], T]) -> T:
    return exchange()
