"""A thread on which rank 0 asks a policy, so that passes go on meanwhile.

What it is at when it is closed (compiling, planning) takes as long as it takes; nobody waits for it, not even the end of the
process, as for the threads of an executor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class PlannerThread:
    """One thread, from here until ``close``. Tasks run in the order in which they come."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="poise-planner", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The outcome of ``function``, an error with it."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - carried to whoever asks for the outcome
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        self._tasks.put(run)
        return outcome

    def close(self) -> None:
        """Ends the thread behind the task that it is at; the others are not begun. Safe to call twice."""
        self._is_closed = True
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_closed:
            task()
