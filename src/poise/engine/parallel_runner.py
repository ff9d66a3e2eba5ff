"""Runs passes of one rank whose experts are spread over several: attention for its own batches, experts together with all.

Every pass begins with an agreement: who has work, and which changes of the placement are in force from now on. A rank without
work runs no forward and comes to each layer's exchange with no tokens (``join``), so that the others can go on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import torch

from poise.engine.overlapped_pass import MIN_ROWS, Half, is_worth_it, run_halves, split
from poise.engine.rank_recorder import RankRecorder
from poise.engine.runner import ForwardInputs
from poise.model.inspect import ExpertsModule
from poise.model.seam import Forward, Parked, attach
from poise.model.streams import settle
from poise.offload.kv_stream import KvStream
from poise.parallel.courier import Courier
from poise.parallel.group import RankGroup
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers
from poise.parallel.routes import Copies
from poise.spec.timeline import COMPUTE, Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What ranks told each other at the begin of a pass; the same on all. ``told_RN``: what each rank added of its own.

    ``in_halves``: one half's exchanges run behind the other half's compute.
    """

    has_work_R: tuple[bool, ...]
    in_halves: bool
    told_RN: tuple[tuple[int, ...], ...]

    @property
    def anyone_works(self) -> bool:
        return any(self.has_work_R)


class ParallelRunner:
    """A model whose experts lie on several ranks. One thread only; ``run`` leaves no forward behind, whatever happens.

    ``recorder``: takes down every layer and pass. ``tell``: what this rank adds to each agreement, always as many numbers;
    ``on_agreement``: is told the outcome, on all ranks alike, before the pass.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[ExpertsModule],
        group: RankGroup,
        layers: ExpertParallelLayers,
        migration: Migration,
        *,
        courier: Courier,
        top_k: int,
        recorder: RankRecorder | None = None,
        tell: Callable[[], Sequence[int]] = tuple,
        on_agreement: Callable[[Agreement], None] | None = None,
    ) -> None:
        attach(model)
        self.model = model
        self.layers = layers
        self.kv: KvStream | None = None
        self.store = layers.experts
        self.recorder = recorder
        self.passes = 0
        """Passes that any rank has run."""
        self.min_half_rows = MIN_ROWS
        """The same on all ranks."""
        self.passes_in_halves = 0
        """Those of them in which exchanges ran behind compute."""
        self.pass_s = 0.0
        """Their time in all, on this rank."""
        self._group = group
        self._migration = migration
        self._top_k = top_k
        self._courier = courier
        self._tell = tell
        self._on_agreement = on_agreement
        self._position = {id(model.get_submodule(module.name)): index for index, module in enumerate(modules)}
        self._num_layers = len(modules)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._agreed_s = 0.0
        layers.on_record = None if recorder is None else recorder.take

    @property
    def timeline(self) -> Timeline | None:
        """Gets a span for all that this rank does, while there is one."""
        return self.layers.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self.layers.timeline = self._migration.timeline = timeline
        if self.layers.balance is not None:
            self.layers.balance.timeline = timeline

    def run(self, group: Sequence[ForwardInputs]) -> list[torch.Tensor]:
        """One pass over the layers for every batch of this rank. Returns each batch's logits (rows, kept tokens, V).

        Raises RankLostError when a rank is lost.
        """
        assert group, "a rank without work joins"
        tokens = [inputs.arguments["input_ids"].numel() for inputs in group]
        first = split(tokens) if len(tokens) > 1 else 0
        agreement = self._agree(tokens=sum(tokens), half_tokens=min(sum(tokens[:first]), sum(tokens[first:])))
        began_s = perf_counter()
        with torch.inference_mode():
            forwards = [Forward(self._forward(inputs)) for inputs in group]
            real = [inputs.real_T for inputs in group]
            try:
                if agreement.in_halves:
                    self._run_halves(
                        [self._half(forwards[:first], real[:first]), self._half(forwards[first:], real[first:])]
                    )
                else:
                    self._lockstep(forwards, real)
            finally:
                for forward in forwards:
                    forward.abort()
        self._count(began_s)
        results = [forward.result for forward in forwards if forward.result is not None]
        assert len(results) == len(forwards), "a forward parked more often than the model has MoE layers"
        return results

    def join(self) -> None:
        """Takes part in the others' passes, without tokens, until no rank has work."""
        while (agreement := self._agree(tokens=0, half_tokens=0)).anyone_works:
            began_s = perf_counter()
            with torch.inference_mode():
                if agreement.in_halves:
                    self._run_halves([self._half([], []), self._half([], [])])
                else:
                    self._lockstep([], [])
            self._count(began_s)

    def _agree(self, *, tokens: int, half_tokens: int) -> Agreement:
        """Tells the others how this rank stands, hears how they stand, and puts what has arrived everywhere into force.

        ``tokens``: that this rank is to run; 0: it has no work.
        """
        began_ns = perf_counter_ns()
        balance = self.layers.balance
        of_steps = (0, 0) if balance is None else balance.told()
        own = [self._migration.arrived, tokens, half_tokens, *of_steps, *self._tell()]
        told = torch.tensor(own, device=self._group.device)
        heard = self._group.all_gather(told).tolist()
        self._agreed_s = (perf_counter_ns() - began_ns) / 1e9
        if self.timeline is not None:
            self.timeline.add(COMPUTE, "wait: agreement", began_ns)
        arrived_R, tokens_R, half_R, *_ = zip(*heard, strict=True)
        changes = self._migration.switch(min(arrived_R))
        placement = self._migration.placement
        for change in changes:
            self.layers.copies_L[change.layer] = Copies.of(
                change.slot_to_expert_S, num_experts=placement.num_experts, num_ranks=placement.ranks
            )
        if balance is not None:
            slot_to_expert_LS, changed = placement.slot_to_expert_LS.astype(np.int64), [each.layer for each in changes]
            told_R = [(saved, spent) for _, _, _, saved, spent, *_ in heard]
            balance.begin_pass(slot_to_expert_LS, changed, tokens=sum(tokens_R), told_R=told_R)
        self.layers.begin_pass()
        has_work_R = tuple(count > 0 for count in tokens_R)
        agreement = Agreement(
            has_work_R=has_work_R,
            in_halves=not self.layers.is_balanced  # a layer's replicas are for all of its tokens
            and is_worth_it(
                half_R,
                has_work_R,
                top_k=self._top_k,
                num_experts=placement.num_experts,
                min_rows=self.min_half_rows,
            ),
            told_RN=tuple(tuple(own) for _, _, _, _, _, *own in heard),
        )
        if self._on_agreement is not None:
            self._on_agreement(agreement)
        return agreement

    def _half(self, forwards: Sequence[Forward], real: Sequence[torch.Tensor | None]) -> Half:
        def start() -> None:
            for batch, forward in enumerate(forwards):
                self._timed(forward.start, 0, batch)

        def resume(layer: int, outputs: Sequence[torch.Tensor]) -> None:
            for batch, (forward, output) in enumerate(zip(forwards, outputs, strict=True)):
                self._timed(partial(forward.resume, output), layer + 1, batch)

        def park(layer: int) -> Sequence[Parked]:
            return [self._parked(forward, mask, layer) for forward, mask in zip(forwards, real, strict=True)]

        return Half(real=real, start=start, park=park, resume=resume)

    def _run_halves(self, halves: Sequence[Half]) -> None:
        run_halves(halves, self.layers, self._courier, num_layers=self._num_layers)
        self.passes_in_halves += 1

    def _lockstep(self, forwards: Sequence[Forward], real: Sequence[torch.Tensor | None]) -> None:
        whole = self._half(forwards, real)
        whole.start()
        for layer in range(self._num_layers):
            whole.resume(layer, self.layers.run(whole.park(layer), real, layer=layer))

    def _timed(self, step: Callable[[], object], layer: int, batch: int) -> None:
        began_ns = perf_counter_ns()
        step()
        if self.timeline is not None:
            settle(self._group.device)
            self.timeline.add(COMPUTE, "attention", began_ns, layer=layer, batch=batch)

    def _parked(self, forward: Forward, mask: torch.Tensor | None, layer: int) -> Parked:
        parked = forward.parked
        assert parked is not None, f"a forward ended before its {layer + 1}th MoE layer"
        position = self._position.get(id(parked.module))
        assert position == layer, f"a batch parked at MoE layer {position} while the group is at {layer}"
        assert mask is None or len(mask) == len(parked.hidden_TH), (
            "the experts see another number of tokens than the batch has"
        )
        return parked

    def _forward(self, inputs: ForwardInputs) -> Callable[[], torch.Tensor]:
        """Passes on what the model's forward takes; a model that computes all logits is cut to the last itself."""
        taken = {name: value for name, value in inputs.arguments.items() if name in self._accepted}
        kept = inputs.arguments["logits_to_keep"]

        def run() -> torch.Tensor:
            logits: torch.Tensor = self.model(**taken).logits
            return logits[:, -kept:] if kept else logits

        return run

    def _count(self, began_s: float) -> None:
        settle(self._group.device)
        pass_s = perf_counter() - began_s
        self.passes += 1
        self.pass_s += pass_s
        if self.timeline is not None:
            self.timeline.add(COMPUTE, "pass", perf_counter_ns() - round(pass_s * 1e9), number=self.passes)
        if self.recorder is not None:
            self.recorder.end_pass(pass_s=pass_s, agreed_s=self._agreed_s)
        if self.layers.learning is not None and self.layers.is_balanced:
            self.layers.learning.between_passes(self.passes)
