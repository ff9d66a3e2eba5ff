"""Everybody's row of numbers over plain sockets: an all-gather for one thread beside the computing one, which has the group."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from time import monotonic

import numpy as np

from poise.parallel.group import RankGroup
from poise.parallel.step_news import Ints

_SLICE_S = 0.2


class RowLinks:
    """``links``: to every other rank, closed at the end."""

    def __init__(self, group: RankGroup, links: Mapping[int, socket.socket]) -> None:
        self._group, self._links = group, links
        self._is_closed = False
        for link in links.values():
            link.settimeout(_SLICE_S)

    def tell_all(self, row_N: Ints) -> Ints:
        """All ranks at once: everybody's row, shape (R, N). Raises RankLostError, on all ranks, where one does not come for as
        long as a rank may keep the others waiting; OSError once it is closed."""
        heard_RN = np.empty((self._group.num_ranks, len(row_N)), dtype=np.int64)
        heard_RN[self._group.rank] = row_N
        try:
            for link in self._links.values():
                link.sendall(row_N.data)  # a row is far shorter than what a socket holds
            for rank, link in self._links.items():
                self._hear(rank, link, memoryview(heard_RN[rank]).cast("B"))
        except OSError as error:
            if self._is_closed:
                raise
            raise self._group.explain(error) from None
        return heard_RN

    def close(self) -> None:
        """Safe to call twice."""
        self._is_closed = True
        for link in self._links.values():
            link.close()

    def _hear(self, rank: int, link: socket.socket, into: memoryview) -> None:
        group, ends_s = self._group, monotonic() + self._group.behind_s
        while into:
            try:
                came = link.recv_into(into)
            except TimeoutError:
                group.check()
                if monotonic() > ends_s:
                    group.end_all(f"rank {group.rank} hears no counts from rank {rank} within {group.behind_s:g} s")
                continue
            if not came:
                raise ConnectionResetError("the other side has closed")
            into = into[came:]
