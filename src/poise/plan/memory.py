"""How a memory budget is divided between experts, caches and activations. Pure functions of numbers.

A plan that does not fit is never returned: ``plan_memory`` raises BudgetError with the smallest budget that would do.
Rows (sequences that run at once) come first up to half of what is free, since every row more makes each expert read serve
more tokens; all that is left keeps experts resident. The pipeline planner with measured costs replaces this rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from poise.errors import BudgetError
from poise.spec.model_spec import CacheSpec
from poise.units import MIB, format_bytes

OVERHEAD_BYTES = 64 * MIB
"""Threads, compiled kernels, allocator slack, Python objects: what grows with nothing a plan decides."""
MAX_EXPERT_ROWS = 512
"""Rows that go through an expert at once: enough for the processor's full rate, few enough to bound what they take."""
BATCH_SIZES = (16, 8, 4, 2, 1)
NUM_BATCHES = (16, 12, 8, 6, 4, 3, 2, 1)
CHUNK_TOKENS = (512, 256, 128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSpec:
    """What one token takes while a pass runs. ``width`` is the widest inner size of a layer; bytes per element ``itemsize``.

    ``expert_width`` is an expert's widest inner size (gate and up together); it sees at most ``MAX_EXPERT_ROWS`` at once.
    ``materialised_heads`` counts the heads whose attention scores are written out in fp32 (0 where a fused kernel runs).
    """

    hidden: int
    width: int
    expert_width: int
    top_k: int
    vocabulary: int
    itemsize: int
    materialised_heads: int

    def pass_bytes(self, *, batch_size: int, num_batches: int, chunk_tokens: int, context_tokens: int) -> int:
        """Peak bytes of a pass: every batch parked at its experts, one of them inside a layer."""
        batch_tokens = batch_size * chunk_tokens
        parked = num_batches * batch_tokens * ((self.top_k + 4) * self.hidden * self.itemsize + self.top_k * 40)
        inside = batch_tokens * (8 * self.hidden + 4 * self.width) * self.itemsize
        scores = batch_tokens * context_tokens * (8 + 12 * self.materialised_heads)
        logits = num_batches * batch_size * self.vocabulary * (self.itemsize + 4)
        expert_rows = min(MAX_EXPERT_ROWS, num_batches * batch_tokens)
        expert = expert_rows * (2 * self.expert_width * self.itemsize + self.hidden * (3 * self.itemsize + 8))
        return parked + inside + expert + scores + logits


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Rows, chunk and slots that fit the budget together. ``num_slots`` experts are in memory at most."""

    batch_size: int
    num_batches: int
    chunk_tokens: int
    num_slots: int
    budget_bytes: int
    dense_bytes: int
    cache_bytes: int
    activation_bytes: int
    experts_bytes: int

    @property
    def max_rows(self) -> int:
        """Sequences that run at once."""
        return self.batch_size * self.num_batches


def plan_memory(
    *,
    budget_bytes: int,
    dense_bytes: int,
    slot_bytes: int,
    num_experts: int,
    cache: CacheSpec,
    activation: ActivationSpec,
    prompt_tokens: Sequence[int],
    total_tokens: Sequence[int],
    max_slots: int | None = None,
    whole_prompts: bool = False,
) -> MemoryPlan:
    """Divides the budget for these requests (``total_tokens[i]``: prompt and output of request i).

    ``whole_prompts``: a chunk takes the longest prompt, for models whose prompts must not be cut.
    Raises BudgetError when not even one row, one slot and the smallest chunk fit.
    """
    wanted_slots = min(num_experts, max_slots or num_experts)
    free = budget_bytes - dense_bytes - OVERHEAD_BYTES
    smallest: int | None = None
    best: MemoryPlan | None = None
    for rows, batch_size, num_batches, chunk in _candidates(len(total_tokens), max(prompt_tokens), whole_prompts):
        cache_bytes = _cache_bytes(cache, prompt_tokens, total_tokens, rows, batch_size)
        activation_bytes = activation.pass_bytes(
            batch_size=batch_size, num_batches=num_batches, chunk_tokens=chunk, context_tokens=max(total_tokens)
        )
        working = cache_bytes + activation_bytes
        smallest = min(smallest or working, working)
        slots = min(wanted_slots, (free - working) // slot_bytes)
        comfortable = slots == wanted_slots or working <= (free - slot_bytes) // 2
        if slots < 1 or (best is not None and (not comfortable or rows <= best.max_rows)):
            continue
        plan = MemoryPlan(
            batch_size=batch_size,
            num_batches=num_batches,
            chunk_tokens=chunk,
            num_slots=slots,
            budget_bytes=budget_bytes,
            dense_bytes=dense_bytes,
            cache_bytes=cache_bytes,
            activation_bytes=activation_bytes,
            experts_bytes=slots * slot_bytes,
        )
        if comfortable or best is None:
            best = plan
    if best is None:
        assert smallest is not None, "there is always a candidate"
        needed = dense_bytes + OVERHEAD_BYTES + smallest + slot_bytes
        raise BudgetError(
            f"a memory budget of {format_bytes(budget_bytes)} is too small; the smallest that works is {needed} bytes "
            f"({format_bytes(needed)}): {format_bytes(dense_bytes)} dense weights, {format_bytes(slot_bytes)} for one expert, "
            f"{format_bytes(smallest + OVERHEAD_BYTES)} to work in",
            smallest_bytes=needed,
        )
    return best


def _candidates(num_requests: int, longest_prompt: int, whole_prompts: bool) -> Iterator[tuple[int, int, int, int]]:
    """(rows, batch size, batches, chunk), fewest rows first; of equal rows the largest chunk first."""
    chunks = [chunk for chunk in CHUNK_TOKENS if chunk < longest_prompt * 2] or [CHUNK_TOKENS[-1]]
    if whole_prompts:
        chunks = [longest_prompt]
    shapes = {
        (min(batch_size, num_requests), num_batches)
        for batch_size in BATCH_SIZES
        for num_batches in NUM_BATCHES
        if (num_batches - 1) * batch_size < num_requests
    }
    for rows, batch_size, num_batches in sorted((b * n, -b, n) for b, n in shapes):
        for chunk in chunks:
            yield rows, -batch_size, num_batches, chunk


def _cache_bytes(
    cache: CacheSpec, prompt_tokens: Sequence[int], total_tokens: Sequence[int], rows: int, batch_size: int
) -> int:
    """Caches of the rows that can run at once and take most; growing a layer copies it.

    Batches take prompts in order of length; a row is as long as its batch's longest prompt and its own answer.
    """
    lengths = sorted(zip(prompt_tokens, total_tokens, strict=True), reverse=True)
    widths = [lengths[index // batch_size * batch_size][0] for index in range(len(lengths))]
    needs = sorted(
        (width + total - prompt for width, (prompt, total) in zip(widths, lengths, strict=True)), reverse=True
    )
    copied = batch_size * needs[0] * cache.largest_layer_bytes_per_token
    return sum(cache.sequence_bytes(tokens) for tokens in needs[:rows]) + 2 * copied
