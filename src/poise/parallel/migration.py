"""Experts move between ranks while passes go on: a thread brings them, layer by layer, and ranks switch between two passes.

Every rank works through the same changes in the same order. A change has arrived on a rank when the experts that the rank gets
lie in spare slots; when it has arrived on all of them, all switch over before the same pass, and the slots of experts that left
become the spare ones. Exchanges run in a process group of their own, so that the computing thread never waits for one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter, sleep

import torch

from poise.model.streams import beside
from poise.parallel.changes import Arrival, LayerChange, changes_between, ranks_of
from poise.parallel.group import Channel, RankGroup
from poise.parallel.rank_experts import RankExperts
from poise.spec.placement import Placement
from poise.spec.timeline import MIGRATION, Timeline
from poise.units import MIB

_POLL_S = 2e-3
APART_S, MOST_APART = 0.5, 40
"""Further patience for each transfer that comes before one."""
MOST_TRIED_BYTES = 4 * MIB
"""That the time of a move is measured with."""


class Migration:
    """The moves of one rank. ``begin``, ``arrived`` and ``switch`` belong to the computing thread."""

    def __init__(self, group: RankGroup, experts: RankExperts, placement: Placement) -> None:
        self._rank = group.rank
        self._num_ranks = group.num_ranks
        self._group = group
        self._channel: Channel = group.open_channel()
        self._experts = experts
        self.placement = placement
        """What ranks compute with now."""
        self._changes: tuple[LayerChange, ...] = ()
        self._started = self._arrived = self._switched = 0
        self._limit = 0
        """Changes that the thread may start."""
        self.timeline: Timeline | None = None
        """Gets a span for each layer that changes."""
        self._received, self._received_s = 0, 0.0
        self._waiting: tuple[Arrival, int, float] | None = None
        """A transfer under way, of which layer, by when it must be done."""
        self._expected_s = _sending_s(group, experts.slot_bytes)
        self._error: Exception | None = None
        self._has_changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"poise-migration-{self._rank}", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether the last placement asked for is in force."""
        return self._switched == len(self._changes)

    @property
    def move_s(self) -> float:
        """What one expert takes to come here from another rank: as it was lately, else as tried out at the start."""
        return self._received_s / self._received if self._received else self._expected_s

    @property
    def arrived(self) -> int:
        """How many changes have arrived here; ranks agree on the smallest of these.

        Raises RankLostError where a transfer broke or keeps waiting.
        """
        error, waiting = self._error, self._waiting
        if isinstance(error, RuntimeError):
            raise self._group.explain(error) from None
        if error is not None:
            raise error
        if waiting is not None and perf_counter() > waiting[2]:
            arrival, layer, _ = waiting
            self._group.end_all(
                f"expert {arrival.expert} of MoE layer {layer} does not come from rank {arrival.from_rank} to rank "
                f"{arrival.to_rank} within {self._group.behind_s:g} s"
            )
        return self._arrived

    def begin(self, after: Placement) -> int:
        """All ranks at once: starts towards a placement. Returns the number of layers that change."""
        assert self.is_idle, "a migration is under way"
        with self._has_changed:
            self._changes = changes_between(self.placement, after)
            self._started = self._arrived = self._switched = 0
            self._limit = len(self._changes)
            self._has_changed.notify_all()
        return len(self._changes)

    def switch(self, agreed: int) -> Sequence[LayerChange]:
        """Between two passes, on all ranks before the same one: ``agreed`` changes in all are now in force.

        Returns the new ones among them.
        """
        assert self._switched <= agreed <= self._arrived, f"{agreed} changes agreed on, {self._arrived} have arrived"
        new = self._changes[self._switched : agreed]
        with self._has_changed:
            for change in new:
                self._switch_layer(change)
            self._switched = agreed
            self._has_changed.notify_all()
        if new:
            rows_LS = self.placement.slot_to_expert_LS.copy()
            for change in new:
                rows_LS[change.layer] = change.slot_to_expert_S
            old = self.placement
            self.placement = Placement(
                slot_to_expert_LS=rows_LS, layers=old.layers, num_experts=old.num_experts, ranks=old.ranks
            )
        return new

    def wind_up(self) -> None:
        """All ranks at once, between passes: changes that a rank has started come to their end, the others are dropped."""
        with self._has_changed:
            self._limit = self._started
        started_R = self._group.all_gather(torch.tensor([self._limit], device=self._group.device))
        with self._has_changed:
            self._limit = int(started_R.max())
            self._changes = self._changes[: self._limit]
            self._has_changed.notify_all()
        while not self.is_idle:
            arrived_R = self._group.all_gather(torch.tensor([self.arrived], device=self._group.device))
            self.switch(int(arrived_R.min()))
            sleep(_POLL_S)

    def close(self) -> None:
        """Ends the thread; a transfer that waits for a rank ends with the process group."""
        with self._has_changed:
            self._closed = True
            self._has_changed.notify_all()
        self._thread.join(timeout=1.0)

    def _switch_layer(self, change: LayerChange) -> None:
        stays = ranks_of(change.slot_to_expert_S, self._num_ranks)[self._rank]
        for expert in set(self._experts.layer(change.layer)) - stays:
            self._experts.dismiss((change.layer, expert))
        for arrival in self._mine(change):
            self._experts.admit((change.layer, arrival.expert))

    def _mine(self, change: LayerChange) -> list[Arrival]:
        return [arrival for arrival in change.arrivals if arrival.to_rank == self._rank]

    def _work(self) -> None:
        with beside(self._group.device):
            self._work_off()

    def _work_off(self) -> None:
        while True:
            with self._has_changed:
                while not self._closed and self._arrived >= self._limit:
                    self._has_changed.wait()
                if self._closed:
                    return
                self._started = self._arrived + 1
                change = self._changes[self._arrived]
                mine = self._mine(change)
                while not self._closed and self._experts.num_free < len(mine):
                    self._has_changed.wait()
                if self._closed:
                    return
                runs = {arrival.expert: self._experts.reserve((change.layer, arrival.expert)) for arrival in mine}
            try:
                with self._span(change):
                    self._bring(change, runs)
            except Exception as error:  # noqa: BLE001 - carried to the computing thread
                self._error = error
                return
            with self._has_changed:
                self._arrived += 1

    def _span(self, change: LayerChange) -> AbstractContextManager[None]:
        if self.timeline is None:
            return nullcontext()
        came = len(self._mine(change))
        return self.timeline.span(MIGRATION, "move experts", layer=change.layer, moved=len(change.arrivals), came=came)

    def _bring(self, change: LayerChange, runs: dict[int, torch.Tensor]) -> None:
        """This rank's part of the change's transfers, in the order that all ranks keep."""
        earlier = sum(len(other.arrivals) for other in self._changes[self._switched : self._arrived])
        for place, arrival in enumerate(change.arrivals, start=earlier):
            key = (change.layer, arrival.expert)
            if self._rank not in (arrival.to_rank, arrival.from_rank):
                continue
            # Of ranks that wait for each other the one at the earliest transfer speaks first: it knows who keeps all waiting.
            by_s = perf_counter() + self._group.behind_s + APART_S * min(place, MOST_APART)
            self._waiting = (arrival, change.layer, by_s)
            if arrival.to_rank != self._rank:
                self._channel.send(self._experts.run(key), arrival.to_rank)
            else:
                self._receive(runs[arrival.expert], arrival.from_rank)
        self._waiting = None

    def _receive(self, run: torch.Tensor, from_rank: int) -> None:
        began_s = perf_counter()
        self._channel.receive(run, from_rank)
        self._received_s += perf_counter() - began_s
        self._received += 1


def _sending_s(group: RankGroup, nbytes: int) -> float:
    """All ranks at once: what a rank takes to send so many bytes to the next one while all do, tried out with fewer."""
    tried = min(nbytes, MOST_TRIED_BYTES)
    sent = torch.zeros(tried, dtype=torch.uint8, device=group.device)
    came = torch.empty_like(sent)
    to_R, from_R = [0] * group.num_ranks, [0] * group.num_ranks
    to_R[(group.rank + 1) % group.num_ranks] = from_R[(group.rank - 1) % group.num_ranks] = tried
    began_s = perf_counter()
    for _ in range(2):  # the first one opens connections
        began_s = perf_counter()
        group.all_to_all(came, sent, from_R, to_R)
    return (perf_counter() - began_s) * nbytes / tried
