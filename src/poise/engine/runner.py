"""Runs a group of forward passes in lockstep: batch by batch up to the experts, each expert once, and on.

This is Klotski's order (section 4 of the paper): attention batch by batch, router by router, then the experts of all
batches together. As soon as a batch has parked its experts are asked for, while the next batch's attention computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Any

import torch

from poise.engine.routing import RoutingListener, choices_TK
from poise.model.inspect import ExpertsModule
from poise.model.moe_layer import chosen_experts, run_experts
from poise.model.seam import Forward, Parked, attach
from poise.offload.dense_stream import DenseStream
from poise.offload.expert_store import ExpertStore
from poise.offload.kv_stream import KvStream
from poise.spec.timeline import COMPUTE


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardInputs:
    """One batch's part of a pass: the model's keyword arguments, and which of its tokens are real.

    ``real_T``: bool, shape (rows * tokens,), False for padding; None when there is no padding.
    """

    arguments: Mapping[str, Any]
    real_T: torch.Tensor | None


class Runner:
    """A model whose experts are in a store. One thread only; ``run`` leaves no forward behind, whatever happens."""

    def __init__(
        self,
        model: Any,
        modules: Sequence[ExpertsModule],
        store: ExpertStore,
        *,
        dense: DenseStream | None = None,
        kv: KvStream | None = None,
    ) -> None:
        attach(model)
        self.model = model
        self.store = store
        self.dense = dense
        self.kv = kv
        self._position = {id(model.get_submodule(module.name)): index for index, module in enumerate(modules)}
        self._num_layers = len(modules)
        self._listeners: list[RoutingListener] = []
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def run(self, group: Sequence[ForwardInputs]) -> list[torch.Tensor]:
        """One pass over the layers for every batch of the group. Returns each batch's logits (rows, kept tokens, V)."""
        with torch.inference_mode(), self._streams(group):
            forwards = [Forward(self._forward(inputs.arguments)) for inputs in group]
            try:
                return self._lockstep(forwards, [inputs.real_T for inputs in group])
            except BaseException:
                for forward in forwards:
                    forward.abort()
                self.store.abandon()
                raise

    def listen(self, listener: RoutingListener | None, *, on: bool = True) -> None:
        """Tells a listener where tokens go from the next pass on, or no longer. None: nobody."""
        others = [each for each in self._listeners if each is not listener]
        self._listeners = [*others, listener] if on and listener is not None else others

    def _forward(self, arguments: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """Passes on what the model's forward takes; a model that computes all logits is cut to the last itself."""
        taken = {name: value for name, value in arguments.items() if name in self._accepted}

        def run() -> torch.Tensor:
            logits: torch.Tensor = self.model(**taken).logits
            kept = arguments["logits_to_keep"]
            return logits[:, -kept:] if kept else logits

        return run

    @contextmanager
    def _streams(self, group: Sequence[ForwardInputs]) -> Iterator[None]:
        """Tells what else is streamed of a pass's begin and end."""
        if self.dense is not None:
            self.dense.begin_pass(len(group))
        if self.kv is not None:
            self.kv.begin_pass([inputs.arguments["past_key_values"] for inputs in group])
        try:
            yield
        finally:
            if self.dense is not None:
                self.dense.end_pass()
            if self.kv is not None:
                self.kv.end_pass()

    def _lockstep(self, forwards: Sequence[Forward], real: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        parked = self._to_experts(forwards, [forward.start for forward in forwards], real, 0)
        for layer in range(self._num_layers):
            self._tell(layer, parked, real)
            outputs = run_experts(self.store, parked, real, layer=layer, timeline=self.store.timeline)
            steps = [partial(forward.resume, output) for forward, output in zip(forwards, outputs, strict=True)]
            parked = self._to_experts(forwards, steps, real, layer + 1)
        results = [forward.result for forward in forwards if forward.result is not None]
        assert len(results) == len(forwards), "a forward parked more often than the model has MoE layers"
        return results

    def _to_experts(
        self,
        forwards: Sequence[Forward],
        steps: Sequence[Callable[[], Parked | None]],
        real: Sequence[torch.Tensor | None],
        layer: int,
    ) -> list[Parked]:
        """Runs every batch to the experts of a MoE layer, or behind the last to its end; through doors all together."""
        while True:
            parked = []
            for batch, (forward, step, mask) in enumerate(zip(forwards, steps, real, strict=True)):
                began_ns = perf_counter_ns()
                now = step()
                if self.store.timeline is not None:
                    self.store.timeline.add(COMPUTE, "attention", began_ns, layer=layer, batch=batch)
                if layer < self._num_layers and not forward.is_at_door:
                    parked.append(self._parked(now, mask, layer))
            if not any(forward.is_at_door for forward in forwards):
                return parked
            assert all(forward.is_at_door for forward in forwards), "a batch waits at a door that others do not come to"
            steps = [forward.go_on for forward in forwards]

    def _tell(self, layer: int, parked: Sequence[Parked], real: Sequence[torch.Tensor | None]) -> None:
        if self._listeners:
            chosen_TK = choices_TK(parked, real)
            for listener in self._listeners:
                listener.on_layer(layer, chosen_TK)

    def _parked(self, now: Parked | None, mask: torch.Tensor | None, layer: int) -> Parked:
        """Checks that a batch stands where all others do, and asks for its experts."""
        assert now is not None, f"a forward ended before its {layer + 1}th MoE layer"
        position = self._position.get(id(now.module))
        assert position == layer, f"a batch parked at MoE layer {position} while the group is at {layer}"
        assert mask is None or len(mask) == len(now.hidden_TH), (
            "the experts see another number of tokens than the batch has"
        )
        self.store.request(layer, chosen_experts(now, mask))
        return now
