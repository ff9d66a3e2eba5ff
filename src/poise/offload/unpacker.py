"""Threads that make quantised experts into weights ahead of the compute thread, each expert in a buffer of a small ring.

Several experts at once and each on one thread: the work is many short operations, and dividing each of those between torch's
threads took longer than doing them alone. All methods are called under the store's lock; ``done`` comes on a thread of ours.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from poise.model.arena import Arena
from poise.model.layout import ExpertSource, Weights
from poise.model.weights import Packed, scratch_bytes_for, unpack
from poise.plan.residency import Key

MAX_THREADS = 4
Done = Callable[[Key, Exception | None], None]
Jobs = queue.SimpleQueue[tuple[Key, int, Packed, Done] | None]


def num_threads() -> int:
    """Threads that a new Unpacker has: as many as torch computes with, up to four."""
    return min(MAX_THREADS, torch.get_num_threads())


def ring_bytes_for(sources_LE: Sequence[Sequence[ExpertSource]]) -> int:
    """Bytes of the ring that a new Unpacker of these experts has; 0 where none is quantised."""
    return (num_threads() + 1) * scratch_bytes_for(sources_LE)


class Unpacker:
    """A ring of ``num_threads() + 1`` buffers of ``buffer_bytes``: one to compute with, the others being filled.

    One that is dropped ends its threads.
    """

    def __init__(self, buffer_bytes: int) -> None:
        self._ring = Arena(num_threads() + 1, buffer_bytes)
        self._free = list(range(self._ring.num_slots))
        self._buffer_of: dict[Key, int] = {}
        self._weights: dict[Key, Weights] = {}
        self._jobs: Jobs = queue.SimpleQueue()
        have_started = threading.Barrier(num_threads() + 1)
        # The threads hold what they work on, not the unpacker: else it would never be dropped.
        work = (self._jobs, self._ring, self._weights, have_started)
        threads = [
            threading.Thread(target=_work, args=work, name=f"poise-reader-unpack-{index}", daemon=True)
            for index in range(num_threads())
        ]
        of_torch = torch.get_num_threads()
        for thread in threads:
            thread.start()
        have_started.wait()
        torch.set_num_threads(of_torch)
        self._end = weakref.finalize(self, _end, self._jobs, threads)
        self._end.atexit = False

    @property
    def has_room(self) -> bool:
        """Whether a buffer is free."""
        return bool(self._free)

    def submit(self, key: Key, packed: Packed, done: Done) -> None:
        """Starts on an expert; ``done`` is called when ``weights`` can be asked for, or with the error."""
        buffer = self._buffer_of[key] = self._free.pop()
        self._jobs.put((key, buffer, packed, done))

    def has(self, key: Key) -> bool:
        """Whether an expert has a buffer."""
        return key in self._buffer_of

    def weights(self, key: Key) -> Weights:
        """The weights of an expert that is done; they hold until it is freed."""
        return self._weights[key]

    def free(self, key: Key) -> None:
        """Takes the buffer back from an expert that is done, or failed; one that has none keeps none."""
        if key in self._buffer_of:
            self._free.append(self._buffer_of.pop(key))
            self._weights.pop(key, None)

    def close(self) -> None:
        """Ends the threads. Safe to call twice."""
        self._end()


def _work(jobs: Jobs, ring: Arena, weights: dict[Key, Weights], have_started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    have_started.wait()
    while _do_next(jobs, ring, weights):
        pass


def _do_next(jobs: Jobs, ring: Arena, weights: dict[Key, Weights]) -> bool:
    """Waits for an expert and unpacks it; False for the end. Once done, nothing of it is held."""
    job = jobs.get()
    if job is None:
        return False
    key, buffer, packed, done = job
    try:
        weights[key] = unpack(packed, ring, buffer)
    except Exception as error:  # noqa: BLE001 - carried to the compute thread, raised by the store's take()
        done(key, error)
    else:
        done(key, None)
    return True


def _end(jobs: Jobs, threads: Sequence[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # a collection of garbage may run on any thread
            thread.join()
