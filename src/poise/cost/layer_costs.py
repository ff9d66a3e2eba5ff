"""What a model's layers cost on a machine, as the pipeline planner asks: from measured curves, or from two rates alone.

Both classes have the methods of ``plan.passes.LayerCosts``. ``RooflineCosts`` is for models so small that measuring would
take longer than it saves: a floor under every time, not a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from poise.cost.lookup import attention_curve, expert_curve, token_curve
from poise.spec.curve import Shape
from poise.spec.machine import Machine

ATTENTION_LAUNCHES, EXPERT_LAUNCHES = 200, 50
"""What transformers' code and ours take of the host's time for a layer's attention, norms and gate of one batch, and for one
expert, in launches of a kernel with nothing around it: 60 and 15 kernels, and the Python between them (measured on a host of an
H200: 53 for an expert of one token, 0.35 ms)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShapes:
    """The shapes of a model's parts under which a machine's curves are filed."""

    expert: Shape
    attention: Shape
    gate: Shape
    dense: Shape


class MachineCosts:
    """Costs from the curves of a machine's first device and its disk. Raises MachineError for shapes it does not have."""

    def __init__(self, machine: Machine, shapes: LayerShapes, *, row_tokens: Sequence[int] = (1, 64)) -> None:
        device = machine.devices[0]
        self._expert = expert_curve(device, shapes.expert)
        self._decode, self._prefill = (attention_curve(device, shapes.attention, row_tokens=n) for n in row_tokens)
        self._gate = token_curve(device, "gate", shapes.gate)
        self._head = token_curve(device, "dense", shapes.dense)
        self.disk_bytes_per_s = machine.tier("disk").bytes_per_s

    def attention_s(self, *, rows: int, row_tokens: int, context_tokens: int) -> float:
        """One batch through everything of a layer but its gate and its experts."""
        curve = self._decode if row_tokens == 1 else self._prefill
        return float(curve.seconds(rows * row_tokens, max(context_tokens, row_tokens)))

    def gate_s(self, tokens: int) -> float:
        """One batch through the router."""
        return float(self._gate.seconds(tokens))

    def experts_s(self, tokens: float, active: float) -> float:
        """``tokens`` rows in all through ``active`` experts, evenly."""
        return float(self._expert.seconds(tokens, active))

    def head_s(self, rows: int) -> float:
        """Logits of ``rows`` rows."""
        return float(self._head.seconds(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineCosts:
    """Every part at ``flops_per_s`` or at ``memory_bytes_per_s`` for its weights, whichever is slower.

    ``itemsize``, ``expert_itemsize``: bytes of a dense weight, and of one of an expert's. ``launch_s``: of the host's
    time, what a GPU's kernel takes; a part takes no less than its own do.
    """

    expert_bytes: int
    attention_bytes: int
    head_bytes: int
    itemsize: int
    expert_itemsize: float
    flops_per_s: float = 100e9
    memory_bytes_per_s: float = 10e9
    disk_bytes_per_s: float = 1e9
    launch_s: float = 0.0

    def attention_s(self, *, rows: int, row_tokens: int, context_tokens: int) -> float:
        """One batch through everything of a layer but its gate and its experts."""
        seconds = self._product_s(self.attention_bytes, rows * row_tokens, self.itemsize)
        return max(seconds, ATTENTION_LAUNCHES * self.launch_s)

    def gate_s(self, tokens: int) -> float:
        """Next to nothing."""
        return 0.0

    def experts_s(self, tokens: float, active: float) -> float:
        """``tokens`` rows in all through ``active`` experts, evenly."""
        seconds = self._product_s(self.expert_bytes, tokens / active, self.expert_itemsize)
        return active * max(seconds, EXPERT_LAUNCHES * self.launch_s)

    def head_s(self, rows: int) -> float:
        """Logits of ``rows`` rows."""
        return self._product_s(self.head_bytes, rows, self.itemsize)

    def _product_s(self, weight_bytes: int, tokens: float, itemsize: float) -> float:
        flops = 2 * weight_bytes / itemsize * tokens
        return max(weight_bytes / self.memory_bytes_per_s, flops / self.flops_per_s)
