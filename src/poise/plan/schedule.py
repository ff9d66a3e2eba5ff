"""One pass over the layers as data: a frozen list of steps with what each waits for, and the rules for what data cannot say.

The order is Klotski's (section 4.2 of the paper): all batches up to the experts of a layer, its experts once for all, and on.
Which experts a layer needs is known only when its routers have spoken, so their reads, their order and what leaves memory for
them follow the schedule's ``policy`` (``plan.expert_reads``). The pipelines of the paper's ablation (table 3) are values of
``num_batches`` and ``policy``; one executor (``engine.executor``) runs them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ReadAhead = Literal["none", "layer", "hot", "likely", "foreseen"]
"""What is read unasked: nothing; all experts of the next layer, in order; its ``ahead`` likeliest; or the likeliest to be
used next, of whatever layer, as far as ``ahead`` slots reach; or, of the next layer only, those that a predictor says are
likelier used than not (without a predictor: as ``likely``)."""
ExpertOrder = Literal["index", "arrival"]
"""In which order a layer's experts compute: by number, as a plain loop does, or those in memory first and then as they come."""
StepKind = Literal["kv", "dense", "attention", "gate", "predict", "experts"]

KV_SLOTS = 2
"""Of batches whose caches lie on disk, so many have one layer of it in memory: one computes, the next is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The rules for experts. The default is Poise's own; the paper's order is ``hot`` and ``arrival``.

    ``ahead``: experts that may be in memory or under way unasked; None: an eighth of the slots.
    """

    read_ahead: ReadAhead = "foreseen"
    order: ExpertOrder = "arrival"
    ahead: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What the compute thread does next.

    - ``kv``: lets the caches be read that the attention of ``batch`` in the stretch ``place`` will need.
    - ``dense``: goes through the door of streamed layer ``place``: waits for its weights, and lets the next layer's be read.
    - ``attention``: one batch through the stretch ``place``, up to a door, to the experts of MoE ``layer``, or to its logits.
    - ``gate``: its router has spoken: the experts it chose that are not in memory are asked for at once.
    - ``predict``: all routers have spoken: what the layer after this one will need is foreseen.
    - ``experts``: each expert of ``layer`` once, over the tokens of all batches, in the policy's order.

    ``layer`` is the MoE layer it belongs to or leads to; behind the last it is their number. ``after``: the steps whose
    results it needs, as positions in the schedule; any order that keeps to them gives the same result.
    """

    kind: StepKind
    layer: int
    batch: int | None = None
    place: int | None = None
    after: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A pass: the steps in the order in which they run, and the rules for experts."""

    steps: tuple[Step, ...]
    policy: Policy


def schedule_pass(
    *,
    num_layers: int,
    num_batches: int,
    streamed: Sequence[int] = (),
    kv_on_disk: bool = False,
    policy: Policy | None = None,
) -> Schedule:
    """``num_layers`` counts MoE layers. ``streamed``: for each decoder layer whose dense weights stream, in the order of the
    pass, how many MoE layers lie before it."""
    assert list(streamed) == sorted(streamed), "streamed layers are in the order of the pass"
    assert all(0 <= before <= num_layers for before in streamed), "a streamed layer lies behind no MoE layer there is"
    points = _meeting_points(num_layers, streamed)
    steps: list[Step] = []
    attention: list[int] = []
    kv: list[int] = []

    def add(step: Step, positions: list[int] | None = None) -> int:
        if positions is not None:
            positions.append(len(steps))
        steps.append(step)
        return len(steps) - 1

    met: tuple[int, ...] = ()
    for stretch, (layer, door) in enumerate(points):
        spoken: list[int] = []
        for batch in range(num_batches):
            turn = len(attention)
            while kv_on_disk and len(kv) < min(turn + KV_SLOTS, len(points) * num_batches):
                add(_kv_step(points, num_batches, len(kv), attention), kv)
            needs = (*met, kv[turn]) if kv_on_disk else met
            at = add(Step(kind="attention", layer=layer, batch=batch, place=stretch, after=needs), attention)
            if door is None and layer < num_layers:
                add(Step(kind="gate", layer=layer, batch=batch, after=(at,)), spoken)
        if door is not None:
            met = (add(Step(kind="dense", layer=layer, place=door, after=tuple(attention[-num_batches:]))),)
        elif layer < num_layers:
            foreseen = add(Step(kind="predict", layer=layer, after=tuple(spoken)))
            met = (foreseen, add(Step(kind="experts", layer=layer, after=tuple(spoken))))
    return Schedule(steps=tuple(steps), policy=policy or Policy())


def _meeting_points(num_layers: int, streamed: Sequence[int]) -> list[tuple[int, int | None]]:
    """Where all batches meet, in order: (MoE layer, None) at experts and at the end, (MoE layer ahead, door) at doors."""
    points: list[tuple[int, int | None]] = []
    for layer in range(num_layers + 1):
        points += [(layer, door) for door, before in enumerate(streamed) if before == layer]
        points.append((layer, None))
    return points


def _kv_step(points: Sequence[tuple[int, int | None]], num_batches: int, turn: int, attention: Sequence[int]) -> Step:
    """Caches of the attention whose ``turn`` it is come into the slot that the last attention but one has left."""
    stretch, batch = divmod(turn, num_batches)
    freed = () if turn < KV_SLOTS else (attention[turn - KV_SLOTS],)
    return Step(kind="kv", layer=points[stretch][0], batch=batch, place=stretch, after=freed)
