"""A thread that does this rank's exchanges, one after the other, while the computing thread goes on.

Exchanges keep the order in which they were handed over, so that all ranks do them in the same order. While any is under way
nobody else may use their group. An error comes out where the outcome is asked for. On a GPU it works on a stream of its own,
behind what the computing thread had queued when it handed an exchange over; outcomes are there when they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from poise.model.streams import new_stream, settle

T = TypeVar("T")


class Courier:
    """One thread, from the first exchange until ``close``. ``device``: of the tensors."""

    def __init__(self, device: torch.device | None = None, *, name: str = "poise-courier") -> None:
        self._name = name
        self._device = device or torch.device("cpu")
        self._thread: ThreadPoolExecutor | None = None
        self._stream = new_stream(self._device)

    def submit(self, exchange: Callable[[], T]) -> Future[T]:
        """Hands an exchange over."""
        if self._thread is None:
            self._thread = _started(self._name)
        if self._stream is None:
            return self._thread.submit(_do, exchange)
        computing = torch.cuda.current_stream(self._device)
        return self._thread.submit(_do_beside, exchange, self._stream, computing, computing.record_event())

    def close(self) -> None:
        """Ends the thread behind the exchange that it is at; the others are not begun. Safe to call twice."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _started(name: str) -> ThreadPoolExecutor:
    of_torch = torch.get_num_threads()
    thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=partial(torch.set_num_threads, 1))
    thread.submit(torch.get_num_threads).result()
    torch.set_num_threads(of_torch)  # setting it on a thread may set it for others
    return thread


@torch.inference_mode()
def _do(exchange: Callable[[], T]) -> T:
    return exchange()


def _do_beside(
    exchange: Callable[[], T], own: torch.cuda.Stream, computing: torch.cuda.Stream, handed_over: torch.cuda.Event
) -> T:
    torch.cuda.set_device(own.device)
    with torch.cuda.stream(own):
        own.wait_event(handed_over)
        outcome = _do(exchange)
        for tensor in _tensors_in(outcome):
            tensor.record_stream(computing)  # its memory is not given to a later exchange while that stream uses it
        settle(own.device)
    return outcome


def _tensors_in(outcome: Any) -> Iterator[torch.Tensor]:
    if isinstance(outcome, torch.Tensor):
        yield outcome
    elif isinstance(outcome, (list, tuple)):
        for each in outcome:
            yield from _tensors_in(each)
    elif is_dataclass(outcome):
        for field in fields(outcome):
            yield from _tensors_in(getattr(outcome, field.name))
