"""The auxiliary track of a rank: a thread that fetches replicas of experts, and serves other ranks', between all-to-alls.

Pull-based and phase-locked (PROBE, section 5): whoever wants a replica asks for one chunk after the other, and only while its
own window is open; whoever has the expert answers only while its own is. So at most one chunk of each rank is on its way
when dispatch or combine begin. What is not there when the layer begins is dropped: nobody waits.
The computing thread calls ``fetch``, ``end_fetch``, ``suspend`` and ``resume``. A chunk that is on its way when a fetch ends is
still received, before the next fetch begins.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter_ns

from poise.parallel.group import RankGroup
from poise.parallel.replica_fetch import Fetch, Fetched, Wanted
from poise.parallel.replica_wire import ASK, CHUNK, GONE, Link, Message
from poise.spec.timeline import Timeline
from poise.units import KIB

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * KIB
Serve = Callable[[Message, int], memoryview | None]
"""(what is asked for, by which rank): a chunk of an expert that is at home here; None if it is not. It stays until that rank
asks again."""


class ReplicaTrack:
    """``links``: a connected socket to each other rank, closed at the end. ``suspends``: False: no window ever closes."""

    def __init__(
        self,
        links: Mapping[int, socket.socket],
        serve: Serve,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        suspends: bool = True,
    ) -> None:
        self._serve, self._chunk_bytes, self._suspends = serve, chunk_bytes, suspends
        self._lock = threading.Lock()
        self._fetch: Fetch | None = None
        self._asked: tuple[Fetch, Message, int, int] | None = None
        """Of which fetch, for what, which rank, when (ns)."""
        self._questions: deque[tuple[Link, Message]] = deque()
        self._is_over = threading.Event()
        """Nothing is to be fetched any more, or nothing can be."""
        self._is_open, self._windows = True, 0
        self._suspended_ns = 0
        self._closing = False
        self.cpu_s = 0.0
        """Processor time that the thread has taken."""
        self.moved_bytes = 0
        """Of experts, in and out, in that time."""
        self._moved_bytes = 0
        self.error: Exception | None = None
        self.lost: set[int] = set()
        """Ranks to which the link has ended."""
        self._missed: set[int] = set()
        """Those of which that has been said."""
        self.timeline: Timeline | None = None
        """Gets a span for each part of a fetch, and for the time in which it is suspended."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._links = {rank: Link(sock, rank, self._place) for rank, sock in links.items()}
        for link in self._links.values():
            self._selector.register(link.sock, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._work, name="poise-replicas", daemon=True)
        self._thread.start()

    def fetch(self, layer: int, wanted: Sequence[Wanted]) -> None:
        """Begins to fetch replicas, in this order. The last fetch has ended."""
        with self._lock:
            assert self._fetch is None, "a fetch ends before the next begins"
            self._fetch = Fetch(layer, wanted, self.timeline)
            if wanted and self.error is None:
                self._is_over.clear()
            else:
                self._is_over.set()
        if wanted and self._is_open:
            self._wake()

    def end_fetch(self) -> Fetched:
        """What is here counts; what is not will not come. Without a fetch: nothing."""
        with self._lock:
            fetch, self._fetch = self._fetch, None
            if fetch is None:
                return Fetched(arrived=(), nbytes=0, busy_s=0.0)
            if not fetch.is_over:
                fetch.is_over = True
                fetch.stop(perf_counter_ns() if fetch.window == self._windows else self._suspended_ns)
            return fetch.fetched

    def finish(self, *, within_s: float) -> Fetched:
        """``end_fetch``, but waits for what is wanted, so long at most. Raises what has broken the thread."""
        is_over = self._is_over.wait(within_s)
        if self.error is not None:
            raise self.error
        if is_over and self._fetch is not None:
            self._fetch.land()
        return self.end_fetch()

    @property
    def waits_since_s(self) -> tuple[float, int, Message] | None:
        """How long a chunk has not come, from which rank, and which."""
        asked = self._asked
        if asked is None:
            return None
        _, message, source, since_ns = asked
        return (perf_counter_ns() - since_ns) / 1e9, source, message

    def check(self, group: RankGroup) -> None:
        """Says once which ranks send no more. Raises what has broken the thread; RankLostError, on all ranks, where a chunk
        does not come for as long as a rank may keep the others waiting."""
        if self.error is not None:
            raise self.error
        for rank in sorted(self.lost - self._missed):
            logger.warning("no replicas come from rank %d any more: the link to it has ended", rank)
            self._missed.add(rank)
        waits = self.waits_since_s
        if waits is not None and waits[0] > group.behind_s:
            _, source, asked = waits
            group.end_all(
                f"expert {asked.expert} of MoE layer {asked.layer} does not come from rank {source} to rank {group.rank} "
                f"within {group.behind_s:g} s"
            )

    def suspend(self) -> None:
        """Tokens are about to travel: asks and answers for no more chunks."""
        if self._suspends:
            self._is_open = False
            self._windows += 1
            self._suspended_ns = perf_counter_ns()

    def resume(self) -> None:
        """The link is free."""
        if self._is_open:
            return
        self._is_open = True
        fetch = self._fetch
        if self._questions or (fetch is not None and not fetch.is_over):
            self._wake()

    def close(self) -> None:
        """Ends the thread and the links. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join(timeout=1.0)
        for sock in (*(link.sock for link in self._links.values()), self._wake_in, self._wake_out):
            sock.close()
        self._selector.close()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"w")
        except BlockingIOError:
            return  # it has not even taken note of the others

    def _work(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select():
                    self._handle(key.data, events)
                self._answer()
                self._go_on()
                self.cpu_s, self.moved_bytes = time.thread_time(), self._moved_bytes
        except Exception as error:  # noqa: BLE001 - carried to the computing thread
            if not self._closing:
                self.error = error
                self._is_over.set()

    def _handle(self, link: Link | None, events: int) -> None:
        if link is None:
            self._wake_in.recv(4096)
            return
        try:
            if events & selectors.EVENT_WRITE:
                link.flush()
                if not link.is_full:
                    self._selector.modify(link.sock, selectors.EVENT_READ, link)
            if events & selectors.EVENT_READ:
                for message in link.receive():
                    if message.kind == ASK:
                        self._questions.append((link, message))
                    else:
                        self._answered(is_gone=message.kind == GONE)
        except OSError:
            self._lost(link)

    def _lost(self, link: Link) -> None:
        """The other rank has left; if too early, ``parallel.watch`` finds out."""
        if self._links.pop(link.rank, None) is None:
            return
        self._selector.unregister(link.sock)
        link.sock.close()
        self._questions = deque(each for each in self._questions if each[0] is not link)
        self.lost.add(link.rank)
        if self._asked is not None and self._asked[2] == link.rank:
            self._answered(is_gone=True)

    def _send(self, link: Link, message: Message, content: memoryview | None = None) -> None:
        try:
            link.send(message, content)
        except OSError:
            self._lost(link)
            return
        if link.is_full:
            self._selector.modify(link.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, link)

    def _answer(self) -> None:
        """Gives the chunks that others have asked for, one after the other, while the window is open."""
        while self._questions and self._is_open and not any(link.is_full for link in self._links.values()):
            link, asked = self._questions.popleft()
            content = self._serve(asked, link.rank)
            self._moved_bytes += 0 if content is None else len(content)
            self._send(link, replace(asked, kind=GONE if content is None else CHUNK), content)

    def _place(self, message: Message) -> memoryview:
        assert self._asked is not None, "a chunk that nobody asked for"
        fetch, asked, *_ = self._asked
        assert replace(message, kind=ASK) == asked, f"{message} came where {asked} was asked for"
        return fetch.wanted[fetch.place].run[message.offset : message.offset + message.nbytes]

    def _answered(self, *, is_gone: bool) -> None:
        """The chunk that was asked for is here, or never will be."""
        assert self._asked is not None, "an answer that nobody asked for"
        fetch, asked, *_ = self._asked
        self._asked = None
        self._moved_bytes += 0 if is_gone else asked.nbytes
        with self._lock:
            if is_gone:
                fetch.skip()
            else:
                fetch.came(asked.nbytes)
            if fetch.is_over:
                fetch.stop(perf_counter_ns())
                if fetch is self._fetch:
                    self._is_over.set()

    def _go_on(self) -> None:
        """Asks for the next chunk, where that may be."""
        while self._asked is None:
            with self._lock:
                fetch = self._fetch
                if fetch is None or fetch.is_over:
                    return
                if not self._is_open:
                    fetch.stop(self._suspended_ns)
                    return
                fetch.go(self._windows, self._suspended_ns)
                wanted = fetch.wanted[fetch.place]
                nbytes = min(self._chunk_bytes, len(wanted.run) - fetch.offset)
                ask = Message(kind=ASK, layer=fetch.layer, expert=wanted.expert, nbytes=nbytes, offset=fetch.offset)
                self._asked = (fetch, ask, wanted.source, perf_counter_ns())
            link = self._links.get(wanted.source)
            if link is None:
                self._answered(is_gone=True)
            else:
                self._send(link, ask)
