"""Runs one pass as its schedule says, step by step: the only loop over layers and batches that there is.

It makes no choice of its own. A batch's forward is a coroutine that stops where all batches meet (``model.seam``); what a step
means is in ``plan.schedule``. That the model stops where the schedule has it is asserted at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns

import torch

from poise.engine.footprint import Ceiling
from poise.engine.routing import RoutingListener, SeamListener, choices_TK, hidden_TH
from poise.model.moe_layer import chosen_experts, run_experts
from poise.model.seam import Forward, Parked
from poise.offload.dense_stream import DenseStream
from poise.offload.expert_store import ExpertStore
from poise.offload.kv_stream import KvStream
from poise.plan.schedule import Schedule, Step
from poise.spec.timeline import COMPUTE


class Executor:
    """One pass of a group of batches. ``real``: bool of shape (rows * tokens,) per batch, False for padding; None: all real.

    ``position``: the MoE layer of each experts module, by its id. ``ceiling``: watched after every step that computes.
    Used once.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        real: Sequence[torch.Tensor | None],
        *,
        position: Mapping[int, int],
        store: ExpertStore,
        dense: DenseStream | None,
        kv: KvStream | None,
        listeners: Sequence[RoutingListener],
        seam_listeners: Sequence[SeamListener] = (),
        ceiling: Ceiling | None = None,
    ) -> None:
        self._forwards = forwards
        self._real = real
        self._position = position
        self._store = store
        self._dense = dense
        self._kv = kv
        self._listeners = listeners
        self._seam_listeners = seam_listeners
        self._ceiling = ceiling
        self._outputs: list[torch.Tensor | None] = []

    def run(self, schedule: Schedule) -> list[torch.Tensor]:
        """Returns each batch's result. Whatever it raises, the forwards are the caller's to end."""
        do = {
            "kv": self._kv_step,
            "dense": self._dense_step,
            "attention": self._attention,
            "gate": self._gate,
            "predict": self._predict,
            "experts": self._experts,
        }
        timeline = self._store.timeline
        for step in schedule.steps:
            if timeline is None:
                do[step.kind](step)
                continue
            began_ns = perf_counter_ns()
            do[step.kind](step)
            of = {} if step.batch is None else {"batch": step.batch}
            timeline.add(COMPUTE, step.kind, began_ns, layer=step.layer, **of)
        results = [forward.result for forward in self._forwards if forward.result is not None]
        assert len(results) == len(self._forwards), "a forward stopped more often than the schedule has it"
        return results

    def _kv_step(self, step: Step) -> None:
        if self._kv is not None:
            self._kv.expect(_given(step.place), _given(step.batch))

    def _dense_step(self, step: Step) -> None:
        assert self._dense is not None, "the schedule has a door and nothing streams"
        assert all(forward.is_at_door for forward in self._forwards), "not every batch stands at the door"
        self._dense.enter(_given(step.place))

    def _attention(self, step: Step) -> None:
        batch = _given(step.batch)
        forward = self._forwards[batch]
        if self._kv is not None:
            self._kv.attend(_given(step.place))
        if forward.is_at_door:
            forward.go_on()
        elif forward.parked is not None:
            output_TH, self._outputs[batch] = self._outputs[batch], None
            assert output_TH is not None, "a batch takes what its experts gave it once"
            forward.resume(output_TH)
        else:
            forward.start()
        self._has_computed()

    def _gate(self, step: Step) -> None:
        batch = _given(step.batch)
        parked, real_T = self._parked(batch, step.layer), self._real[batch]
        assert real_T is None or len(real_T) == len(parked.hidden_TH), (
            "the experts see another number of tokens than the batch has"
        )
        self._store.request(step.layer, chosen_experts(parked, real_T))

    def _predict(self, step: Step) -> None:
        parked = self._all_parked(step.layer)
        chosen_TK = choices_TK(parked, self._real)
        self._store.judge(step.layer, chosen_TK)
        for listener in self._listeners:
            listener.on_layer(step.layer, chosen_TK)
        if self._seam_listeners:
            seen_TH = hidden_TH(parked, self._real)
            for watcher in self._seam_listeners:
                watcher.on_seam(step.layer, seen_TH, chosen_TK)

    def _experts(self, step: Step) -> None:
        parked = self._all_parked(step.layer)
        timeline = self._store.timeline
        self._outputs = [*run_experts(self._store, parked, self._real, layer=step.layer, timeline=timeline)]
        self._has_computed()

    def _has_computed(self) -> None:
        if self._ceiling is not None:
            self._ceiling.keep()

    def _all_parked(self, layer: int) -> list[Parked]:
        return [self._parked(batch, layer) for batch in range(len(self._forwards))]

    def _parked(self, batch: int, layer: int) -> Parked:
        """The batch, which stands where all others do."""
        parked = self._forwards[batch].parked
        assert parked is not None, f"a forward is not at its {layer + 1}th MoE layer, where the schedule has it"
        position = self._position.get(id(parked.module))
        assert position == layer, f"a batch parked at MoE layer {position} while the group is at {layer}"
        return parked


def _given(number: int | None) -> int:
    assert number is not None, "the step says which"
    return number
