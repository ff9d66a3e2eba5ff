"""The time of experts as the engine runs them: ``model.moe_layer`` over weights that lie in an arena of slots.

An expert's weights come from memory at every use in the engine, so the experts take turns here too: as many as the scratch
memory holds, more bytes than a processor's cache where it allows that.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import torch

from poise.model.arena import Arena
from poise.model.int4 import GROUP, Int4Weight, padded_shape
from poise.model.layout import ExpertSource, Weights
from poise.model.moe_layer import run_experts
from poise.model.read_plan import plan_reads
from poise.model.seam import Parked
from poise.model.weights import Packed, stays_as_read, weights_in_slot
from poise.profile.measure import Clock, Run
from poise.profile.rates import read_into_slots
from poise.profile.subject import Subject, fill_random

MAX_EXPERTS = 32
"""Experts in memory at once."""
TENSOR_ALIGNMENT = 64


class ResidentExperts:
    """Stands for a store whose experts are all in memory; hands out the next ``active`` ones as 0, 1, ..."""

    def __init__(self, weights_E: Sequence[Weights]) -> None:
        self.num_experts = len(weights_E)
        self._weights = itertools.cycle(weights_E)
        self._names: Iterator[int] = iter(())

    def ask(self, active: int) -> None:
        """Says how many experts a layer is about to take."""
        self._names = iter(range(active))

    def take(self) -> tuple[int, Weights]:
        return next(self._names), next(self._weights)

    def release(self, expert: int) -> None:
        """Nothing is evicted."""


def load_experts(subject: Subject, *, scratch_bytes: int, device: str = "cpu") -> ResidentExperts:
    """Experts in an arena: the model's own, read by the engine's reader, where they lie on disk as they are computed with.

    For another ``device`` than the processor, copies there.
    """
    if subject.int4:
        assert device == "cpu", "the 4-bit kernel is the processor's"
        return _in_4_bits(subject, scratch_bytes)
    nbytes = sum(_padded(shape, subject.dtype) for shape in subject.param_shapes.values())
    count = max(1, min(MAX_EXPERTS, subject.modules[0].num_experts, scratch_bytes // nbytes))
    sources = subject.sources_LE[0][:count] if subject.sources_LE is not None else ()
    if sources and all(map(stays_as_read, sources)) and (weights_E := _read(sources)) is not None:
        return ResidentExperts([_on(device, weights) for weights in weights_E])
    arena = Arena(count, nbytes)
    return ResidentExperts([_on(device, _random(subject, arena, slot)) for slot in range(count)])


def expert_run(
    subject: Subject,
    experts: ResidentExperts,
    *,
    tokens: int,
    active: int,
    clock: Clock = time.perf_counter,
    device: str = "cpu",
) -> Run:
    """A run of one MoE layer: ``tokens`` rows in all, each for one expert, spread evenly over ``active`` of them."""
    assert tokens % active == 0, "tokens are spread evenly"
    assert active <= experts.num_experts, "so many experts are not in memory"
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn((tokens, subject.hidden), generator=generator).to(subject.dtype)
    choice_T = torch.arange(active).repeat_interleave(tokens // active)[torch.randperm(tokens, generator=generator)]
    weights_T1 = torch.full((tokens, 1), 0.5, dtype=subject.dtype)
    batch = (hidden_TH.to(device), choice_T.unsqueeze(1).to(device), weights_T1.to(device))
    parked = [Parked(subject.experts_module, *batch)]

    def run() -> tuple[float, ...]:
        experts.ask(active)
        with torch.inference_mode():
            begin = clock()
            run_experts(experts, parked, [None])
            return (clock() - begin,)

    return run


def _read(sources: Sequence[ExpertSource]) -> list[Weights] | None:
    """The experts' weights over the bytes that the engine's reader brings; None where they are still quantised there."""
    plans = [plan_reads(source.parts) for source in sources]
    arena = Arena(len(plans), max(plan.nbytes for plan in plans))
    read_into_slots([part.file for source in sources for part in source.parts], plans, arena)
    loaded: list[Weights] = []
    for slot, (source, plan) in enumerate(zip(sources, plans, strict=True)):
        weights = weights_in_slot(arena, slot, source, plan, None, lambda source, raw: {})
        if isinstance(weights, Packed):
            return None
        loaded.append(weights)
    return loaded


def _random(subject: Subject, arena: Arena, slot: int) -> Weights:
    weights: Weights = {}
    offset = 0
    for param, shape in subject.param_shapes.items():
        size = math.prod(shape) * subject.dtype.itemsize
        place = arena.bytes_of(slot, offset, size).view(subject.dtype).view(shape)
        weights[param] = (fill_random(place),)
        offset += _padded(shape, subject.dtype)
    return weights


def _on(device: str, weights: Weights) -> Weights:
    if device == "cpu":
        return weights
    moved: Weights = {}
    for name, parts in weights.items():
        assert isinstance(parts, tuple), "experts are timed as weights, not as what they are made from"
        moved[name] = tuple(part.to(device) for part in parts)
    return moved


def _in_4_bits(subject: Subject, scratch_bytes: int) -> ResidentExperts:
    """Random levels and scales in the kernel's form, outputs by inputs whatever the model's own order is."""
    matrices = {param: shape for param, shape in subject.param_shapes.items() if len(shape) == 2}
    nbytes = 9 * sum(map(math.prod, matrices.values())) // 16
    count = max(1, min(MAX_EXPERTS, subject.modules[0].num_experts, scratch_bytes // nbytes))
    order = -1 if subject.experts_module.is_transposed else 1
    made: list[Weights] = []
    for _ in range(count):
        made.append({param: _random_4_bits(*shape[::order]) for param, shape in matrices.items()})
    return ResidentExperts(made)


def _random_4_bits(outputs: int, inputs: int) -> Int4Weight:
    rows, columns = padded_shape(outputs, inputs)
    return Int4Weight(
        outputs=outputs,
        inputs=inputs,
        packed_NK=torch.randint(
            256, (rows, columns // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
        scale_zero_GN2=fill_random(torch.empty(columns // GROUP, rows, 2, dtype=torch.bfloat16)),
    )


def _padded(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
