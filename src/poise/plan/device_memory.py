"""What a pass takes of an accelerator's memory besides weights and caches. Pure functions of numbers.

Unlike on a CPU nothing is made fp32 for a product, and memory goes back at once to an allocator that knows every tensor: what
counts is the larger of two moments, one batch inside its attention or all batches at their experts, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.plan.memory import ACTIVATION_SLACK, MAX_EXPERT_ROWS, WIDE_BYTES, ActivationSpec

PARKED = 3
"""Hidden sizes of a token whose batch waits while another is inside a layer: the residual stream, what goes into the experts or
came out of them, and one that is about to be freed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceActivationSpec(ActivationSpec):
    """As ``ActivationSpec`` for an accelerator, held against what live tensors take (``tests/unit/test_device_memory.py``)."""

    def pass_bytes(
        self,
        *,
        batch_size: int,
        num_batches: int,
        chunk_tokens: int,
        context_tokens: int,
        pass_tokens: int | None = None,
        is_masked: bool = True,
    ) -> int:
        """Peak bytes of a pass. ``is_masked``: whether attention gets a mask, for which keys and values are repeated."""
        batch_tokens = batch_size * chunk_tokens
        all_tokens = self.most_tokens(batch_tokens, num_batches, batch_size, pass_tokens)
        token_bytes = self.hidden * self.itemsize
        inside = batch_tokens * (8 * self.hidden + 4 * self.width) * self.itemsize
        scores = batch_tokens * context_tokens * (8 + 12 * self.materialised_heads)
        repeated = batch_size * context_tokens * self.repeated_width * self.itemsize if is_masked else 0
        attention = all_tokens * PARKED * token_bytes + inside + scores + repeated
        expert_rows = min(MAX_EXPERT_ROWS, all_tokens)
        expert = expert_rows * (2 * self.expert_width * self.itemsize + 2 * token_bytes + 2 * WIDE_BYTES * self.hidden)
        experts = all_tokens * ((self.top_k + 4) * token_bytes + self.top_k * 40) + expert
        logits = num_batches * batch_size * self.vocabulary * (self.itemsize + 4)
        whole = max(attention, experts) + logits
        return whole + whole // ACTIVATION_SLACK
