"""What travels over a link of the auxiliary track: questions for a chunk of an expert, and chunks.

A message is a header and, behind a chunk's, its bytes, which are received straight into the place where they belong. Sockets
never block. One side asks for one chunk at a time, so that a link holds at most one chunk of each direction.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

ASK, CHUNK, GONE = 0, 1, 2
"""``GONE``: the expert is not there any more."""
_HEADER = struct.Struct("<iiiiq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """``nbytes`` of an expert of a layer, from ``offset`` on: asked for, sent, or gone."""

    kind: int
    layer: int
    expert: int
    nbytes: int
    offset: int


class Link:
    """One socket, on the thread of the track. ``place``: where the bytes of a chunk belong."""

    def __init__(self, sock: socket.socket, rank: int, place: Callable[[Message], memoryview]) -> None:
        sock.setblocking(False)
        self.sock, self.rank = sock, rank
        self._place = place
        self._out: deque[memoryview] = deque()
        self._head = memoryview(bytearray(_HEADER.size))
        self._into = self._head
        self._message: Message | None = None
        """Whose bytes are on their way."""

    def send(self, message: Message, content: memoryview | None = None) -> None:
        """Puts a message behind those that wait, and sends what can be sent. OSError where the link is gone."""
        head = _HEADER.pack(message.kind, message.layer, message.expert, message.nbytes, message.offset)
        self._out.append(memoryview(head))
        if content is not None:
            self._out.append(content)
        self.flush()

    def flush(self) -> None:
        """Sends what can be sent."""
        while self._out:
            try:
                sent = self.sock.send(self._out[0])
            except BlockingIOError:
                return
            if sent < len(self._out[0]):
                self._out[0] = self._out[0][sent:]
            else:
                self._out.popleft()

    @property
    def is_full(self) -> bool:
        """Whether something waits until it can be sent."""
        return bool(self._out)

    def receive(self) -> list[Message]:
        """Messages that are here whole. Raises OSError, also where the other side has closed."""
        done: list[Message] = []
        while True:
            try:
                came = self.sock.recv_into(self._into)
            except BlockingIOError:
                return done
            if not came:
                raise ConnectionResetError("the other side has closed")
            self._into = self._into[came:]
            if not self._into:
                self._step(done)

    def _step(self, done: list[Message]) -> None:
        """A header, or the bytes behind it, are complete."""
        message, self._message = self._message, None
        if message is None:
            kind, layer, expert, nbytes, offset = _HEADER.unpack(self._head)
            message = Message(kind=kind, layer=layer, expert=expert, nbytes=nbytes, offset=offset)
            if kind == CHUNK:
                self._message, self._into = message, self._place(message)
                return
        self._into = self._head
        done.append(message)
