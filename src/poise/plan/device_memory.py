"""What a pass takes of an accelerator's memory besides weights and caches. Pure functions of numbers.

Unlike on a CPU nothing is made fp32 for a product, and memory goes back at once to an allocator that knows every tensor: what
counts is the larger of two moments, one batch inside its attention or all batches at their experts, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.plan.memory import ACTIVATION_SLACK, MAX_EXPERT_ROWS, WIDE_BYTES, ActivationSpec

PARKED = 4
"""Hidden sizes of a token whose batch waits while another is inside a layer: its embedding, which transformers keeps to the
end, the residual stream, what came out of the experts before, and what goes into the next."""
BESIDE = 5
"""Of a token at its experts, beside what each of them gives: its embedding, the residual stream, what goes in, that once more
with all batches in one, and the sum that comes out."""


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
        rotary = token_bytes // 4
        inside = batch_tokens * 4 * (self.hidden + self.width) * self.itemsize
        scores = batch_tokens * context_tokens * (8 + 12 * self.materialised_heads)
        repeated = batch_size * context_tokens * self.repeated_width * self.itemsize if is_masked else 0
        attention = all_tokens * (PARKED * token_bytes + rotary) + inside + scores + repeated
        expert_rows = min(MAX_EXPERT_ROWS, all_tokens)
        expert = expert_rows * (2 * self.expert_width * self.itemsize + 2 * token_bytes + 2 * WIDE_BYTES * self.hidden)
        experts = all_tokens * ((self.top_k + BESIDE) * token_bytes + rotary + self.top_k * 40) + expert
        logits = num_batches * batch_size * self.vocabulary * 2 * self.itemsize
        whole = max(attention, experts) + logits
        return whole + whole // ACTIVATION_SLACK
