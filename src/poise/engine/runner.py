"""A model whose weights are streamed: makes each pass's schedule, and has the executor run it over a group of batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from poise.engine.executor import Executor
from poise.engine.footprint import Ceiling
from poise.engine.routing import RoutingListener, SeamListener
from poise.model.inspect import ExpertsModule
from poise.model.seam import Forward, attach
from poise.offload.dense_stream import DenseStream
from poise.offload.expert_store import ExpertStore
from poise.offload.kv_stream import KvStream
from poise.plan.schedule import Policy, Schedule, schedule_pass
from poise.spec.timeline import COMPUTE


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardInputs:
    """One batch's part of a pass: the model's keyword arguments, and which of its tokens are real.

    ``real_T``: bool, shape (rows * tokens,), False for padding; None when there is no padding.
    """

    arguments: Mapping[str, Any]
    real_T: torch.Tensor | None


class Runner:
    """A model whose experts are in a store. One thread only; ``run`` leaves no forward behind, whatever happens.

    ``policy``: the rules for experts of the passes to come. ``dense`` and ``kv``: what
    else streams, dense layers and caches; None: they are in memory. All three may change between passes. ``ceiling``: the
    most that the process shall take, if passes are to watch it.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[ExpertsModule],
        store: ExpertStore,
        *,
        dense: DenseStream | None = None,
        kv: KvStream | None = None,
        ceiling: Ceiling | None = None,
    ) -> None:
        attach(model)
        self.model = model
        self.store = store
        self.dense = dense
        self.kv = kv
        self._ceiling = ceiling
        self._position = {id(model.get_submodule(module.name)): index for index, module in enumerate(modules)}
        self._num_layers = len(modules)
        self._last: tuple[tuple[object, ...], Schedule] | None = None
        self.policy = Policy()
        self._listeners: list[RoutingListener] = []
        self._seam_listeners: list[SeamListener] = []
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def run(self, group: Sequence[ForwardInputs]) -> list[torch.Tensor]:
        """One pass over the layers for every batch of the group. Returns each batch's logits (rows, kept tokens, V)."""
        schedule = self._schedule(len(group))
        with torch.inference_mode(), self._streams(group, schedule):
            forwards = [Forward(self._forward(inputs.arguments)) for inputs in group]
            executor = Executor(
                forwards,
                [inputs.real_T for inputs in group],
                position=self._position,
                store=self.store,
                dense=self.dense,
                kv=self.kv,
                listeners=self._listeners,
                seam_listeners=self._seam_listeners,
                ceiling=self._ceiling,
            )
            try:
                return executor.run(schedule)
            except BaseException:
                for forward in forwards:
                    forward.abort()
                self.store.abandon()
                raise

    def listen(self, listener: RoutingListener | None, *, on: bool = True) -> None:
        """Tells a listener where tokens go from the next pass on, or no longer. None: nobody."""
        others = [each for each in self._listeners if each is not listener]
        self._listeners = [*others, listener] if on and listener is not None else others

    def watch(self, watcher: SeamListener | None, *, on: bool = True) -> None:
        """The same for one that wants the hidden states at each MoE layer as well."""
        others = [each for each in self._seam_listeners if each is not watcher]
        self._seam_listeners = [*others, watcher] if on and watcher is not None else others

    def _forward(self, arguments: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """Passes on what the model's forward takes; a model that computes all logits is cut to the last itself."""
        taken = {name: value for name, value in arguments.items() if name in self._accepted}

        def run() -> torch.Tensor:
            logits: torch.Tensor = self.model(**taken).logits
            kept = arguments["logits_to_keep"]
            return logits[:, -kept:] if kept else logits

        return run

    @contextmanager
    def _streams(self, group: Sequence[ForwardInputs], schedule: Schedule) -> Iterator[None]:
        """Tells whatever is streamed of a pass's begin and end."""
        timeline = self.store.timeline
        self.store.policy = schedule.policy
        if self.dense is not None:
            self.dense.timeline = timeline
            self.dense.begin_pass()
        if self.kv is not None:
            self.kv.timeline = timeline
            self.kv.begin_pass([inputs.arguments["past_key_values"] for inputs in group])
        try:
            with nullcontext() if timeline is None else timeline.span(COMPUTE, "pass"):
                yield
        finally:
            self.store.cut_gap()
            if self.dense is not None:
                self.dense.end_pass()

    def _schedule(self, num_batches: int) -> Schedule:
        """The pass of so many batches; the last one is kept, as most passes are like the one before."""
        of = num_batches, () if self.dense is None else self.dense.names, self.kv is not None, self.policy
        if self._last is None or self._last[0] != of:
            schedule = schedule_pass(
                num_layers=self._num_layers,
                num_batches=num_batches,
                streamed=() if self.dense is None else self.dense.moe_layers,
                kv_on_disk=self.kv is not None,
                policy=self.policy,
            )
            self._last = of, schedule
        return self._last[1]
