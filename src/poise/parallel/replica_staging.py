"""Replicas on GPUs: pinned memory of the host between the sockets and the slots, and the copy engines that bring them over.

Whatever arrives whole is copied into its slot on a stream of its own, behind the last layer that computed with the slot; it
counts when the copy is done, which nobody waits for. What others ask for is copied out chunk by chunk, on another stream, as
the two directions have a copy engine each. On a CPU sockets reach the slots themselves, and none of this is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from poise.model.streams import new_stream
from poise.parallel.replica_wire import Message

RunOf = Callable[[int, int], torch.Tensor | None]
"""(layer, expert): the bytes (uint8) of an expert that is at home here; None if it is not."""


class Landing:
    """A replica's way from the host's memory into its slot. The track's thread calls ``all_here``, the computing one the rest.

    ``behind``: what the copy must not overtake; None: nothing.
    """

    def __init__(
        self, host: torch.Tensor, slot: torch.Tensor, stream: torch.cuda.Stream | None, behind: torch.cuda.Event | None
    ) -> None:
        self._host, self._slot = host, slot
        self._stream, self._behind = stream, behind
        self._copied: torch.cuda.Event | None = None
        self._has_begun = False

    @torch.inference_mode()
    def all_here(self) -> None:
        """Begins the copy, whatever mode the slot's memory was made in."""
        if self._stream is None:
            self._slot.copy_(self._host)
        else:
            with torch.cuda.stream(self._stream):
                if self._behind is not None:
                    self._stream.wait_event(self._behind)
                self._slot.copy_(self._host, non_blocking=True)
                self._copied = self._stream.record_event()
        self._has_begun = True

    @property
    def is_done(self) -> bool:
        """Whether the replica is in its slot."""
        return self._has_begun and (self._copied is None or bool(self._copied.query()))  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until a copy that has begun is done."""
        if self._copied is not None:
            self._copied.synchronize()


class Outlet:
    """Chunks of the experts at home, for the ranks that ask. On the track's thread only."""

    def __init__(
        self,
        run_of: RunOf,
        device: torch.device,
        *,
        num_ranks: int,
        chunk_bytes: int,
        through_host: bool | None = None,
    ) -> None:
        """``chunk_bytes``: that one rank asks for at most. ``through_host``: whether they are copied; None: where they lie on a
        GPU. Memory for that is taken here, as pinning it later would cost the first replicas their window."""
        self._run_of = run_of
        self._stream = new_stream(device)
        self._chunk_of: torch.Tensor | None = None
        if device.type != "cpu" if through_host is None else through_host:
            self._chunk_of = host_memory(num_ranks, chunk_bytes, pinned=device.type == "cuda")

    @torch.inference_mode()
    def chunk(self, asked: Message, rank: int) -> memoryview | None:
        """The bytes that ``rank`` asks for, until it asks again; None for an expert that is not here."""
        run = self._run_of(asked.layer, asked.expert)
        if run is None:
            return None
        chunk = run[asked.offset : asked.offset + asked.nbytes]
        if self._chunk_of is None:
            return chunk.numpy().data
        copy = self._chunk_of[rank, : len(chunk)]
        if self._stream is None:
            copy.copy_(chunk)
        else:
            with torch.cuda.stream(self._stream):
                copy.copy_(chunk, non_blocking=True)
                self._stream.synchronize()
        return copy.numpy().data


def host_memory(*shape: int, pinned: bool) -> torch.Tensor:
    """Bytes, which copy engines reach if they are pinned."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
