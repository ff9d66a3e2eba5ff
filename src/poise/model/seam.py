"""The seam: a batch's forward pass is a coroutine that parks at its experts.

Each batch runs transformers' own ``model.forward`` in a greenlet. The experts function registered here does not compute:
it hands (module, hidden states, top-k choices and weights) to whoever resumed the greenlet and waits for the output. So
any number of batches can stand at the same layer while each expert is read and run once for all of them.

A forward can also stand at a door (``wait_for_the_others``): code between two experts modules that wants all batches of a
group to be there before one goes on, such as a decoder layer whose dense weights are read from disk.

Contract: all greenlets of a group live and die on one thread. No context manager, autocast or dispatch mode may span a
park, so ``inference_mode`` is entered outside. A forward that is not driven to its end must be ended with ``abort``.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass

import greenlet
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from poise.model.wide import widen_linears

EXPERTS_IMPLEMENTATION = "poise"


@dataclass(frozen=True, slots=True)
class Parked:
    """A batch that stands at ``module``. Shapes: hidden_TH, top_k_index_TK (int64), top_k_weights_TK."""

    module: nn.Module
    hidden_TH: torch.Tensor
    top_k_index_TK: torch.Tensor
    top_k_weights_TK: torch.Tensor


_DOOR = object()
"""What a forward at a door hands to whoever resumed it."""


class _ForwardGreenlet(greenlet.greenlet):  # type: ignore[misc]  # greenlet ships no types
    """Marks the greenlets in which parking is possible."""


class Forward:
    """One forward pass that parks at every experts module.

    ``start``, ``resume`` and ``go_on`` run it until it parks (``parked`` is set), stands at a door (``is_at_door``) or ends
    (``result`` is set).
    """

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._greenlet = _ForwardGreenlet(run)
        self._greenlet.gr_context = contextvars.copy_context()
        self.parked: Parked | None = None
        self.is_at_door = False
        self.result: torch.Tensor | None = None

    def start(self) -> Parked | None:
        """Runs to the first experts module, or to the end of a model pass without one."""
        return self._take(self._greenlet.switch())

    def resume(self, output_TH: torch.Tensor) -> Parked | None:
        """Hands the experts' output to the parked forward and runs it to the next park or to its end."""
        assert self.parked is not None, "resume needs a parked forward"
        return self._take(self._greenlet.switch(output_TH))

    def go_on(self) -> Parked | None:
        """Runs a forward that stands at a door to its next park, its next door or its end."""
        assert self.is_at_door, "only a forward at a door goes on without an output"
        return self._take(self._greenlet.switch())

    def abort(self) -> None:
        """Ends a parked forward by raising GreenletExit inside it; harmless when it has ended or never ran."""
        self.parked, self.is_at_door = None, False
        if not self._greenlet.dead:
            self._greenlet.throw(greenlet.GreenletExit)
        assert self._greenlet.dead, "a forward swallowed GreenletExit and parked again"

    def _take(self, value: Parked | torch.Tensor | object) -> Parked | None:
        self.is_at_door = value is _DOOR
        if self.is_at_door:
            assert not self._greenlet.dead, "a forward returned a door instead of waiting at it"
            self.parked = None
            return None
        if isinstance(value, Parked):
            assert not self._greenlet.dead, "a forward returned a Parked instead of parking"
            self.parked = value
            return value
        assert self._greenlet.dead, "a forward switched out of its greenlet other than by parking"
        assert isinstance(value, torch.Tensor), "a forward ended without its logits"
        self.parked, self.result = None, value
        return None


def park(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function: parks the forward that called it. Signature as transformers' registry has it."""
    current = greenlet.getcurrent()
    if not isinstance(current, _ForwardGreenlet):
        raise RuntimeError("this model's experts are streamed by Poise: run it through poise.LLM, not by calling it")
    parent = current.parent
    assert parent is not None
    output: torch.Tensor = parent.switch(Parked(module, hidden_states, top_k_index, top_k_weights))
    return output


def wait_for_the_others() -> None:
    """Stops the forward that called it at a door, until whoever drives the group has all of them there."""
    current = greenlet.getcurrent()
    assert isinstance(current, _ForwardGreenlet), "only a forward that can park can wait at a door"
    assert current.parent is not None
    current.parent.switch(_DOOR)


def attach(model: nn.Module) -> None:
    """Registers the seam with transformers, turns the model's experts over to it, and its products into faster ones."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, park)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)  # type: ignore[operator]
    widen_linears(model)
