"""What brings experts into the slots of a store from the tier below it: from the disk into DRAM, or from DRAM onto a device.

The store says which expert goes to which slot and bounds how many are under way; it calls every method under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from poise.model.layout import ExpertSource, Weights
from poise.model.reader import Done, Label, Read
from poise.model.weights import Packed
from poise.plan.residency import Key
from poise.spec.timeline import Timeline

Loaded = Callable[[Key, Weights | Packed | None, Exception | None], None]
"""Told of an expert that may be taken: its weights, None where the bytes are the weights (``laid_out``), or the error."""


class Supplier(Protocol):
    """``max_under_way``: what it can do at once. ``track``: where the timeline notes its work, and its idle time."""

    max_under_way: int
    track: str
    timeline: Timeline | None

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        ...

    def source(self, key: Key) -> ExpertSource:
        """Where an expert lies on disk."""
        ...

    def nbytes(self, key: Key) -> int:
        """What is moved for an expert."""
        ...

    def start(self, key: Key, slot: int, *, label: str, done: Loaded) -> None:
        """Has an expert brought into a slot; the timeline calls that ``label``. ``done`` is called on another thread."""
        ...

    def open(self, files: Sequence[Path]) -> None:
        """Opens files of what is no expert, too. Raises ReadError."""
        ...

    def read(self, reads: Sequence[Read], done: Done, *, label: Label) -> None:
        """Queues reads of what is no expert."""
        ...

    def laid_out(self, key: Key, slot: int) -> Weights:
        """Tensors over the slot of an expert whose bytes are its weights."""
        ...

    def resize(self, num_slots: int) -> None:
        """So many slots are in service from now on; nothing is under way."""
        ...

    def enter(self, layer: int) -> None:
        """A layer begins to ask."""
        ...

    def will_use(self, experts: Sequence[int]) -> None:
        """What the layer at hand asks for."""
        ...

    def before_use(self, slot: int) -> None:
        """What compute is told to do from now on needs what was brought into the slot."""
        ...

    def after_use(self, slot: int) -> None:
        """What compute has been told to do so far needs it; what comes later does not."""
        ...

    def close(self) -> None:
        """Ends the threads. Safe to call twice."""
        ...
