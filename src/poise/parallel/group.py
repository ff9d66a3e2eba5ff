"""The ranks of a job as one group: they meet, compare what they run, exchange tensors, and end together.

``torch.distributed`` carries everything, by the same calls whatever is below (``parallel.carrier``). The host waits for every
exchange, on GPUs too, so that what an exchange took is known, Ctrl-C comes through, and the wait ends when a rank is lost
(``parallel.watch``). A rank that leaves with an error says so first, so that the others end at once and with its reason.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from poise.errors import RankLostError
from poise.parallel.carrier import GLOO, GLOO_THROUGH_HOST, Carrier
from poise.parallel.handshake import shake_hands, wait_for_keys
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience, Watch

logger = logging.getLogger(__name__)

_SLICE = timedelta(milliseconds=200)
"""How long a wait keeps signals and verdicts waiting."""
SPIN_S, NAP_S = 2e-3, 50e-6
"""Waiting for a GPU: at first without a pause, as exchanges take some 50 us, then looking so often."""


class RankGroup:
    """This rank among the others. A context manager; one at a time in a process, opened on the main thread.

    ``facts``: what all ranks must have in common (``handshake.facts_of``), the ``carrier`` among them. Raises RanksError where
    they do not, or do not meet.
    """

    def __init__(
        self,
        launch: Launch,
        facts: Mapping[str, str],
        *,
        patience: Patience | None = None,
        device: torch.device | None = None,
        carrier: Carrier = GLOO,
    ) -> None:
        self._patience = patience = patience or Patience()
        self.rank, self.num_ranks = launch.rank, launch.num_ranks
        self.device = device or torch.device("cpu")
        self.carrier = carrier
        self._launch = launch
        self._store = launch.connect(timeout_s=patience.start_s)
        self._told_to_end = False
        self._watch: Watch | None = None
        try:
            shake_hands(self._store, self.rank, self.num_ranks, facts, timeout_s=patience.start_s)
            self._handler = signal.signal(signal.SIGTERM, self._on_terminate)
            own = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own, for its own thread
            self._watch = Watch(own, self.rank, self.num_ranks, patience)
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            dist.init_process_group(
                self.carrier.backend,
                store=PrefixStore("collectives", self._store),
                rank=self.rank,
                world_size=self.num_ranks,
                timeout=timedelta(seconds=4 * self._patience.behind_s),  # the watch is there to end waits, and says why
                device_id=self.device if self.carrier.backend == "nccl" else None,
            )
        except RuntimeError as error:
            raise self._watching.explain(_first_line(error)) from None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which collects results and speaks for all."""
        return self.rank == 0

    @property
    def takes_fewer(self) -> bool:
        """Whether ``all_to_all`` may be told of more rows than come: those that come lie at the begin of their rank's piece.

        Gloo only asks that a message fits; NCCL asks for the very size, and what is staged on its way is copied whole.
        """
        return self.carrier.backend == "gloo" and self.device.type == "cpu"

    @property
    def _watching(self) -> Watch:
        assert self._watch is not None, "the group is closed"
        return self._watch

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_R: Sequence[int],
        sent_R: Sequence[int],
        *,
        meanwhile: Callable[[], None] | None = None,
        while_waiting: Callable[[Callable[[], bool]], None] | None = None,
    ) -> None:
        """Rows of ``sent`` go to ranks 0, 1, ... in pieces of ``sent_R`` rows; ``received`` is filled likewise.

        ``meanwhile`` is called while they travel, and then ``while_waiting``, with what says whether all have come.
        """
        self._enter()
        place, taken = self.carrier.place_for(received), self.carrier.taken(sent)
        try:
            work = dist.all_to_all_single(place, taken, list(received_R), list(sent_R), async_op=True)
        except RuntimeError as error:
            raise self._watching.explain(_first_line(error)) from None
        if meanwhile is not None:
            meanwhile()
        if while_waiting is not None:
            while_waiting(work.is_completed)
        self._wait(work)
        self.carrier.put_back(place, received)

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Everybody's tensor of one shape, stacked along a new first dimension: shape (R, *mine.shape)."""
        if self.carrier.backend == "gloo":
            return self._straight_to_all(mine)
        self._enter()
        taken = self.carrier.taken(mine)
        gathered = [torch.empty_like(taken) for _ in range(self.num_ranks)]
        try:
            work = dist.all_gather(gathered, taken, async_op=True)
        except RuntimeError as error:
            raise self._watching.explain(_first_line(error)) from None
        self._wait(work)
        return torch.stack(gathered).to(self.device)

    def _straight_to_all(self, mine: torch.Tensor) -> torch.Tensor:
        """Gloo's own gather goes round a ring: a message behind the other, from rank to rank (decision 065)."""
        sent = mine.expand(self.num_ranks, *mine.shape).contiguous()
        heard, one_each = torch.empty_like(sent), [1] * self.num_ranks
        self.all_to_all(heard, sent, one_each, one_each)
        return heard

    def put(self, key: str, value: str) -> None:
        """Leaves a text for another rank in the store. Not for much: all of it goes through one process."""
        self._store.set(f"text/{key}", value)

    def take(self, key: str) -> str:
        """Takes a text that another rank has left, out of the store."""
        value: bytes = self._store.get(f"text/{key}")
        self._store.delete_key(f"text/{key}")
        return value.decode()

    def hear(self, key: str) -> str:
        """Waits for a text that rank 0 puts for all, as long as it takes. Raises RankLostError."""
        while not wait_for_keys(self._store, [f"text/{key}"], timeout_s=_SLICE.total_seconds()):
            self.check()
        value: bytes = self._store.get(f"text/{key}")
        return value.decode()

    def first_alone(self, what: str, work: Callable[[], None]) -> None:
        """All ranks do the ``work``, and the others when rank 0 has: what it compiles is machine code that they find. Raises
        RankLostError when a rank is lost meanwhile."""
        if not self.is_first:
            self.hear(what)
        work()
        if self.is_first:
            self.put(what, "yes")

    def meet(self, what: str) -> None:
        """Waits for all ranks to come to the same point, as long as for their start. Raises RankLostError."""
        self._store.set(f"{what}/{self.rank}", "yes")
        deadline_s = time.monotonic() + self._patience.start_s
        for other in range(self.num_ranks):
            while not wait_for_keys(self._store, [f"{what}/{other}"], timeout_s=_SLICE.total_seconds()):
                self.check()
                if time.monotonic() > deadline_s:
                    self._watching.judge(
                        f"rank {other} is not {what} within {self._patience.start_s:g} s; all ranks end"
                    )
                    self.check()

    def open_channel(self) -> Channel:
        """All ranks at once: a process group of its own, for one other thread. A GPU's tensors go through host memory, as NCCL
        promises no progress where two threads use it at once."""
        carrier = GLOO if self.device.type == "cpu" and not self.carrier.through_host else GLOO_THROUGH_HOST
        group = dist.new_group(backend=carrier.backend, timeout=timedelta(seconds=4 * self._patience.behind_s))
        return Channel(group, carrier)

    def explain(self, error: Exception) -> RankLostError:
        """Why a transfer on a channel broke: waits for the verdict about a rank that is gone, else ends all for ``error``."""
        return self._watching.explain(_first_line(error))

    def end_all(self, message: str) -> None:
        """Ends the job on all ranks. Raises RankLostError, with ``message`` unless there is a verdict already."""
        self._watching.judge(f"{message}; all ranks end")
        self.check()

    @property
    def meeting_host(self) -> str:
        """Where the store lies."""
        return self._launch.host

    @property
    def behind_s(self) -> float:
        """How long a rank may keep the others waiting."""
        return self._patience.behind_s

    def _enter(self) -> None:
        self.check()
        self._watching.enter()

    def _wait(self, work: dist.Work) -> None:
        if self.carrier.backend == "nccl":
            self._look_until_done(work)
        while True:
            was_completed = work.is_completed()
            try:
                work.wait(_SLICE)
            except RuntimeError as error:
                if was_completed:
                    raise self._watching.explain(_first_line(error)) from None
                self.check()
            else:
                self._watching.leave()
                return

    def _look_until_done(self, work: dist.Work) -> None:
        """NCCL's own wait keeps streams waiting, not the host, or the host without an end."""
        began_s = looked_s = time.monotonic()
        while not work.is_completed():
            now_s = time.monotonic()
            time.sleep(NAP_S if now_s - began_s > SPIN_S else 0.0)  # other threads want to run as well
            if now_s - looked_s > _SLICE.total_seconds():
                looked_s = now_s
                self.check()

    def check(self) -> None:
        """Raises RankLostError if the job is lost or this process was told to end. Every exchange begins with it."""
        self._watching.raise_if_lost()
        if self._told_to_end:
            if not self._watching.find_lost(2 * self._patience.suspicion_s):
                self._watching.judge(f"rank {self.rank} was told to end (SIGTERM); all ranks end", was_told=True)
            self._watching.raise_if_lost()

    def give_up(self, error: BaseException) -> None:
        """Tells the others to end, and why, before this rank tidies up; nothing where they have the same error."""
        if self._watch is None or isinstance(error, RankLostError):
            return
        # Whoever was interrupted says no word of its own, but on rank 0 (``cli``).
        speaker = 0 if isinstance(error, KeyboardInterrupt) else None
        self._watch.judge(f"rank {self.rank} gave up: {_said(error)}; all ranks end", speaker=speaker)

    def close(self) -> None:
        """Leaves the group. Safe to call twice. The rank that keeps the store leaves last."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.close()
        signal.signal(signal.SIGTERM, self._handler)
        if self._launch.keeps_store:
            patience = self._patience
            others = [f"gone/{other}" for other in range(self.num_ranks) if other != self.rank]
            wait_for_keys(self._store, others, timeout_s=patience.suspicion_s if watch.is_lost else patience.leave_s)
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.give_up(error)
        self.close()

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        """``torchrun`` ends all ranks so when one has died: the waits find out which."""
        self._told_to_end = True


class Channel:
    """Tensors from rank to rank on a thread of their own. Blocking; RuntimeError when the other side is gone."""

    def __init__(self, group: dist.ProcessGroup | None, carrier: Carrier) -> None:
        self._group, self._carrier = group, carrier

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Returns when the tensor may be overwritten."""
        _finish(dist.isend(self._carrier.taken(tensor), group=self._group, group_dst=rank))

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fills the tensor with what ``rank`` sends."""
        place = self._carrier.place_for(tensor)
        _finish(dist.irecv(place, group=self._group, group_src=rank))
        self._carrier.put_back(place, tensor)


def _finish(work: dist.Work | None) -> None:
    assert work is not None, "this rank is in the group"
    work.wait()


def _said(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
