"""Rows of numbers between ranks over plain sockets: all hear all, and who hears nothing ends the job in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from poise.parallel.row_links import RowLinks

WIDTH = 300


class Group:
    """What links ask of their group."""

    num_ranks = 2
    behind_s = 0.3

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def check(self) -> None:
        """Nobody is lost."""

    def end_all(self, message: str) -> None:
        raise RuntimeError(message)

    def explain(self, error: Exception) -> Exception:
        return RuntimeError(f"explained: {error}")


@pytest.fixture
def two_ranks() -> Iterator[list[RowLinks]]:
    ends = socket.socketpair()
    links = [RowLinks(cast(Any, Group(rank)), {1 - rank: ends[rank]}) for rank in range(2)]
    yield links
    for each in links:
        each.close()


def test_all_hear_all(two_ranks: list[RowLinks]) -> None:
    rows_RN = np.arange(2 * WIDTH).reshape(2, WIDTH)
    heard: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda at=rank: heard.update({at: two_ranks[at].tell_all(rows_RN[at])}))  # type: ignore[misc]
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    for rank in range(2):
        np.testing.assert_array_equal(heard[rank], rows_RN)


def test_who_hears_nothing_ends_the_job_in_time(two_ranks: list[RowLinks]) -> None:
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0 hears no counts from rank 1 within 0\.3 s"):
        two_ranks[0].tell_all(np.zeros(WIDTH, dtype=np.int64))
    assert Group.behind_s <= time.monotonic() - began_s < 5


def test_a_link_that_ends_is_explained_and_ones_own_end_is_not(two_ranks: list[RowLinks]) -> None:
    two_ranks[1].close()
    with pytest.raises(RuntimeError, match="explained: "):
        two_ranks[0].tell_all(np.zeros(WIDTH, dtype=np.int64))
    two_ranks[0].close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        two_ranks[0].tell_all(np.zeros(WIDTH, dtype=np.int64))
