"""One pass over the layers as data: what the disk reads ahead, which batch computes when, in which order experts run.

``schedule_pass`` returns the steps of the compute thread in order, and what each must wait for; the disk's side is a rule,
since which experts a layer needs is known only when its routers have spoken: demand first, then ``ReadAhead``. Klotski's
pipeline and the simpler ones it is compared with (table 3 of the paper) are options here, run by one executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReadAhead = Literal["none", "layer", "hot", "likely", "foreseen"]
"""What is read unasked: nothing; all experts of the next layer, in order; its ``ahead`` likeliest; or the likeliest to be
used next, of whatever layer, as far as ``ahead`` slots reach; or, of the next layer only, those that a predictor says are
likelier used than not (without a predictor: as ``likely``)."""
ExpertOrder = Literal["index", "arrival"]
"""In which order a layer's experts compute: by number, as a plain loop does, or those in memory first and then as they come."""
StepKind = Literal["attention", "experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How a pass is run. The default is Poise's own; the paper's order is ``hot`` and ``arrival``.

    ``ahead``: experts that may be in memory or under way unasked; None: an eighth of the slots.
    """

    read_ahead: ReadAhead = "foreseen"
    order: ExpertOrder = "arrival"
    ahead: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Work of the compute thread: attention and router of one batch in the stretch before MoE layer ``layer``, or that
    layer's experts for all batches. The last stretch, behind the last MoE layer, ends in the logits.

    ``after``: steps whose results it needs, as positions in the schedule.
    """

    kind: StepKind
    layer: int
    batch: int | None
    after: tuple[int, ...]


def schedule_pass(*, num_layers: int, num_batches: int) -> tuple[Step, ...]:
    """Klotski's order (section 4.2): all batches up to the experts of a layer, its experts once for all, and on.

    ``num_layers`` counts MoE layers. Attention of a batch waits for the experts before it; experts wait for every batch.
    """
    steps: list[Step] = []
    experts: tuple[int, ...] = ()
    for layer in range(num_layers + 1):
        first = len(steps)
        steps += [Step(kind="attention", layer=layer, batch=batch, after=experts) for batch in range(num_batches)]
        if layer < num_layers:
            experts = (len(steps),)
            steps.append(Step(kind="experts", layer=layer, batch=None, after=tuple(range(first, len(steps)))))
    return tuple(steps)
