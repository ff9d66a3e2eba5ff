"""Signs of life: every rank says over the store that it lives and how far it is; who falls silent or stays behind is named.

A thread per rank beats and looks at the others' beats. The first rank to find one lost writes the verdict into the store, and
every rank ends with it: the computing thread at its next exchange, or, where it does not come to one within ``leave_s``, the
process from here. Clocks of different machines are never compared: silence is measured by who listens.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

from poise.errors import RankLostError

logger = logging.getLogger(__name__)

VERDICT = "verdict"
_LEFT = "left"
_LOST, _TOLD = "lost", "told"
"""Kinds of verdicts: a rank is lost, or was told to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a rank waits before it calls another one lost, in seconds.

    ``start_s``: for all to join. ``beat_s``: between signs of life. ``silent_s``: without one (dead, frozen, cut off).
    ``behind_s``: in an exchange that another rank does not come to, though it lives. ``leave_s``: for the computing thread
    to end once the job is lost.
    """

    start_s: float = 300.0
    beat_s: float = 0.5
    silent_s: float = 10.0
    behind_s: float = 120.0
    leave_s: float = 15.0

    @property
    def suspicion_s(self) -> float:
        """Silence that is enough where something else says that a rank is gone."""
        return max(4 * self.beat_s, min(2.0, self.silent_s))

    def __post_init__(self) -> None:
        assert 0 < self.beat_s <= self.silent_s / 4, f"a beat each {self.beat_s} s is too rare for {self.silent_s} s"


@dataclass(slots=True)
class _Seen:
    """What was last heard of a rank, when, and how many exchanges it had entered."""

    beat: bytes
    at_s: float
    entered: int = 0
    has_left: bool = False


class Watch:
    """The signs of life of one rank, and its view of the others'. ``store``: a connection of its own."""

    def __init__(self, store: Store, rank: int, num_ranks: int, patience: Patience) -> None:
        self._store = store
        self._rank = rank
        self._patience = patience
        self._entered = 0
        self._waiting_since_s: float | None = None
        self._suspects_until_s = 0.0
        self._beats = 0
        self._verdict = ""
        self._is_speaker = self._was_told = False
        self._judged = threading.Event()
        self._ending = threading.Event()
        now_s = time.monotonic()
        self._seen = {other: _Seen(beat=b"", at_s=now_s) for other in range(num_ranks) if other != rank}
        self._beat("")
        self._thread = threading.Thread(target=self._run, name=f"poise-watch-{rank}", daemon=True)
        self._thread.start()

    def enter(self) -> None:
        """The computing thread enters an exchange."""
        self._entered += 1
        self._waiting_since_s = time.monotonic()

    def leave(self) -> None:
        """The exchange is done."""
        self._waiting_since_s = None

    @property
    def is_lost(self) -> bool:
        """Whether there is a verdict."""
        return self._judged.is_set()

    def raise_if_lost(self) -> None:
        """Raises RankLostError with the verdict, if there is one."""
        if self._judged.is_set():
            raise self._lost()

    def judge(self, message: str, *, speaker: int | None = None, was_told: bool = False) -> None:
        """Ends the job on all ranks with ``message``, unless there is a verdict already. ``speaker``: who says it aloud, if not
        this rank. ``was_told``: this rank was told to end, and nobody is lost."""
        said_by = self._rank if speaker is None else speaker
        verdict = f"{said_by} {_TOLD if was_told else _LOST} {message}"
        try:
            standing: bytes = self._store.compare_set(VERDICT, "", verdict)
        except RuntimeError:
            self._close_case(verdict)  # nobody else can know
        else:
            self._close_case(standing.decode())

    def explain(self, cause: str) -> RankLostError:
        """Finds out why a connection broke: waits for a verdict, or for a rank that has fallen silent."""
        if not self.find_lost(2 * self._patience.suspicion_s):
            self.judge(f"rank {self._rank} has lost its connection to the others: {cause}; all ranks end")
        return self._lost()

    def find_lost(self, within_s: float) -> bool:
        """Looks for a rank that is gone, with less patience than usual, since something says that there is one."""
        self._suspects_until_s = time.monotonic() + within_s
        return self._judged.wait(within_s)

    def close(self) -> None:
        """Says goodbye, so that silence from now on is no cause for alarm. Safe to call twice."""
        if self._thread.is_alive():
            self._ending.set()
            self._thread.join()
        try:
            self._beat(_LEFT)
            self._store.set(f"gone/{self._rank}", "yes")
        except RuntimeError:
            logger.debug("the store has gone before rank %d said goodbye", self._rank)

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._ending.wait(self._patience.beat_s):
            if time.monotonic() - last_s > self._patience.silent_s / 2:
                self._begin_anew()  # this process was away itself: nobody is judged by what it missed
            last_s = time.monotonic()
            try:
                self._beat("")
                self._listen()
            except RuntimeError as error:
                if not self._ending.is_set():
                    self._close_case(
                        f"{self._rank} {_LOST} the ranks' meeting point is gone ({_first_line(error)}); all ranks end"
                    )
            if self._judged.is_set():
                self._make_sure_to_end()
                return

    def _beat(self, state: str) -> None:
        self._beats += 1
        self._store.set(_key(self._rank), f"{self._beats} {self._entered} {state}")

    def _listen(self) -> None:
        asked_s = time.monotonic()
        if self._store.check([VERDICT]):
            self._close_case(self._store.get(VERDICT).decode())
            return
        known = [other for other in self._seen if self._store.check([_key(other)])]
        for other, beat in zip(known, self._store.multi_get([_key(each) for each in known]), strict=True):
            seen = self._seen[other]
            if beat != seen.beat:
                _, entered, state = beat.decode().split(" ")
                seen.beat, seen.at_s, seen.entered, seen.has_left = beat, asked_s, int(entered), state == _LEFT
        message = self._silent() or self._behind()
        if message is not None:
            self.judge(message)

    def _silent(self) -> str | None:
        """Names the rank that is silent for longest, if that is too long."""
        now_s = time.monotonic()
        suspects = now_s < self._suspects_until_s
        allowed_s = self._patience.suspicion_s if suspects else self._patience.silent_s
        silent_s = {other: now_s - seen.at_s for other, seen in self._seen.items() if not seen.has_left}
        rank = max(silent_s, key=silent_s.__getitem__, default=None)
        if rank is None or silent_s[rank] <= allowed_s:
            return None
        return f"rank {rank} has died or is frozen: no sign of life for {silent_s[rank]:.1f} s; all ranks end"

    def _behind(self) -> str | None:
        """Names the ranks that do not come to the exchange in which this one has waited for too long."""
        since_s = self._waiting_since_s
        if since_s is None or time.monotonic() - since_s < self._patience.behind_s:
            return None
        first = min((seen.entered for seen in self._seen.values()), default=self._entered)
        late = [str(other) for other, seen in self._seen.items() if seen.entered == first]
        if first >= self._entered:
            return f"the network between ranks has stood still for {self._patience.behind_s:g} s; all ranks end"
        return (
            f"rank {' and '.join(late)} stalled: alive, but not at exchange {self._entered} for which the others have "
            f"waited {self._patience.behind_s:g} s; all ranks end"
        )

    def _begin_anew(self) -> None:
        for seen in self._seen.values():
            seen.at_s = time.monotonic()

    def _close_case(self, verdict: str) -> None:
        """``verdict``: who alone says it aloud, of which kind it is, and what."""
        if not self._judged.is_set():
            speaker, kind, self._verdict = verdict.split(" ", 2)
            self._is_speaker, self._was_told = int(speaker) == self._rank, kind == _TOLD
            self._judged.set()

    def _lost(self) -> RankLostError:
        return RankLostError(self._verdict, is_speaker=self._is_speaker, was_told_to_end=self._was_told)

    def _make_sure_to_end(self) -> None:
        """A computing thread that never comes back (stuck in a kernel, a read, a connection) must not outlive the job."""
        if not self._ending.wait(self._patience.leave_s):
            if self._is_speaker:
                sys.stderr.write(f"error: {self._verdict}\n")
                sys.stderr.flush()
            os._exit(1)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
