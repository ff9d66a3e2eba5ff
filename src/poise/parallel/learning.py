"""What a rank may do while it has nothing but to wait for others: learn, for instance (``engine.rank_learning``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from poise.model.seam import Parked


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """``steps`` made and what they took on this rank; of ``late`` ones the others did not wait for, but for them."""

    steps: int = 0
    seconds: float = 0.0
    late: int = 0


class Learning(Protocol):
    """Of one rank, on its computing thread, in passes that are balanced."""

    def on_layer(self, layer: int, parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> None:
        """This rank's own batches stand at a layer."""

    def wait(self, layer: int, is_over: Callable[[], bool]) -> None:
        """Outputs are on their way, and this rank waits for them until ``is_over``. Returns when it has nothing to do."""

    def waited(self, layer: int, seconds: float) -> None:
        """They are here, so long after this rank was ready for them."""

    def between_passes(self, passes: int) -> None:
        """All ranks at once, behind so many passes."""

    def taken(self) -> Learnt:
        """Since it was last asked."""
        ...
