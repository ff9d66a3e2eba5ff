"""Runs a group of forward passes in lockstep: batch by batch up to the experts, each expert once, and on.

This is Klotski's order (section 4 of the paper): attention batch by batch, router by router, then the experts of all
batches together. As soon as a batch has parked its experts are asked for, while the next batch's attention computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from poise.model.inspect import ExpertsModule
from poise.model.seam import Forward, Parked, attach
from poise.offload.expert_store import ExpertStore
from poise.offload.moe_layer import chosen_experts, run_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardInputs:
    """One batch's part of a pass: the model's keyword arguments, and which of its tokens are real.

    ``real_T``: bool, shape (rows * tokens,), False for padding; None when there is no padding.
    """

    arguments: Mapping[str, Any]
    real_T: torch.Tensor | None


class Runner:
    """A model whose experts are in a store. One thread only; ``run`` leaves no forward behind, whatever happens."""

    def __init__(self, model: Any, modules: Sequence[ExpertsModule], store: ExpertStore) -> None:
        attach(model)
        self.model = model
        self.store = store
        self._position = {id(model.get_submodule(module.name)): index for index, module in enumerate(modules)}
        self._num_layers = len(modules)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def run(self, group: Sequence[ForwardInputs]) -> list[torch.Tensor]:
        """One pass over the layers for every batch of the group. Returns each batch's logits (rows, kept tokens, V)."""
        with torch.inference_mode():
            forwards = [Forward(self._forward(inputs.arguments)) for inputs in group]
            try:
                return self._lockstep(forwards, [inputs.real_T for inputs in group])
            except BaseException:
                for forward in forwards:
                    forward.abort()
                self.store.abandon()
                raise

    def _forward(self, arguments: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """Passes on what the model's forward takes; a model that computes all logits is cut to the last itself."""
        taken = {name: value for name, value in arguments.items() if name in self._accepted}

        def run() -> torch.Tensor:
            logits: torch.Tensor = self.model(**taken).logits
            kept = arguments["logits_to_keep"]
            return logits[:, -kept:] if kept else logits

        return run

    def _lockstep(self, forwards: Sequence[Forward], real: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        parked = [self._parked(forward.start(), mask, 0) for forward, mask in zip(forwards, real, strict=True)]
        for layer in range(self._num_layers):
            outputs = run_experts(self.store, parked, real)
            parked = []
            for forward, output, mask in zip(forwards, outputs, real, strict=True):
                now = forward.resume(output)
                if layer + 1 < self._num_layers:
                    parked.append(self._parked(now, mask, layer + 1))
        results = [forward.result for forward in forwards if forward.result is not None]
        assert len(results) == len(forwards), "a forward parked more often than the model has MoE layers"
        return results

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
