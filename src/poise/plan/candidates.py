"""What the pipeline planner chooses among: group shapes, caches in memory or on disk, and the memory that each takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from poise.plan.dense import DensePlan
from poise.plan.group import GroupShape
from poise.plan.memory import OVERHEAD_BYTES, ActivationSpec, CacheTokens
from poise.plan.passes import UNDER_WAY
from poise.plan.workload import Workload
from poise.spec.model_spec import CacheSpec, ModelSpec

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
NUM_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CHUNK_TOKENS = (16, 64, 256, 512)
PASS_TOKENS = (512, 2048, 4096, 8192)
DEVICE_NUM_BATCHES = (*range(1, 13), 14, 16, 20, 24, 32)
DEVICE_PASS_TOKENS = (*PASS_TOKENS, 12288, 16384, 24576, 32768, 49152, 65536)
"""A GPU computes so fast that a pass's weights take longer to come than tens of thousands of tokens to compute. What fits is
worth knowing to a few rows: time goes by passes, whatever they carry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineModel:
    """A model in the numbers that a pipeline needs. ``slot_bytes``: one expert in memory; ``scratch_bytes``: beside slots.

    ``dense``: the ways in which its dense weights may lie, from most memory to least. ``may_move_cache``: whether caches may
    be planned on disk. ``num_batches``, ``pass_tokens``: numbers of batches, caps on the prompt tokens of a pass.
    ``wants_large_passes``: of plans that are alike in speed, the one with most tokens in a pass, as passes have costs that are
    not known. ``wanted_slots``: more rows are no reason to plan fewer, where so many fit at all. ``under_way``: as
    ``plan.passes`` has it. ``most_moved_bytes``: room where caches move to; None: not known. ``budget_name``: what refusals
    call the budget.
    """

    spec: ModelSpec
    cache: CacheSpec
    activation: ActivationSpec
    dense: tuple[DensePlan, ...]
    slot_bytes: int
    scratch_bytes: int = 0
    whole_prompts: bool = False
    max_slots: int | None = None
    may_move_cache: tuple[bool, ...] = (False,)
    num_batches: tuple[int, ...] = NUM_BATCHES
    pass_tokens: tuple[int, ...] = PASS_TOKENS
    wants_large_passes: bool = False
    wanted_slots: int = 1
    under_way: int = UNDER_WAY
    most_moved_bytes: int | None = None
    budget_name: str = "memory budget"

    @property
    def fixed_bytes(self) -> int:
        """Memory that every plan takes."""
        return self.scratch_bytes + OVERHEAD_BYTES

    @property
    def smallest_dense(self) -> DensePlan:
        """The way of the dense weights that takes least memory."""
        return min(self.dense, key=lambda dense: dense.memory_bytes)

    @property
    def most_slots(self) -> int:
        """Slots beyond which none is of use, or allowed."""
        num_experts = sum(self.spec.experts_L)
        return min(num_experts, self.max_slots or num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """``cache_bytes`` and ``activation_bytes``: memory that it takes besides weights; ``disk_cache_bytes``: caches there."""

    group: GroupShape
    cache_on_disk: bool
    cache_bytes: int
    disk_cache_bytes: int
    activation_bytes: int

    @property
    def working_bytes(self) -> int:
        """Memory of the rows that run."""
        return self.cache_bytes + self.activation_bytes

    def least_bytes(self, model: PipelineModel, dense: DensePlan) -> int:
        """Memory with a single slot."""
        return self.working_bytes + dense.memory_bytes + model.fixed_bytes + model.slot_bytes


def candidates(model: PipelineModel, workload: Workload, only: Sequence[tuple[int, int]] | None) -> Iterator[Candidate]:
    """All of them, whether they fit or not. ``only``: (batch size, batches) to choose among."""
    tokens_of: dict[int, CacheTokens] = {}
    longest = max(workload.total_tokens)
    for group in _groups(model, workload, only):
        size = group.batch_size
        if size not in tokens_of:
            tokens_of[size] = CacheTokens.of(workload.prompt_tokens, workload.total_tokens, size)
        activation_bytes = model.activation.pass_bytes(
            batch_size=size,
            num_batches=group.num_batches,
            chunk_tokens=group.chunk_tokens,
            context_tokens=longest,
            pass_tokens=group.pass_tokens,
            is_masked=_is_masked(model, workload, group),
        )
        in_memory = tokens_of[size].bytes_in(model.cache, group.max_rows)
        left = tokens_of[size].bytes_in(model.cache.on_disk(), group.max_rows)
        moved = tokens_of[size].most(group.max_rows) * model.cache.movable_bytes_per_token
        for on_disk in model.may_move_cache:
            if on_disk and model.most_moved_bytes is not None and moved > model.most_moved_bytes:
                continue
            yield Candidate(
                group=group,
                cache_on_disk=on_disk,
                cache_bytes=left if on_disk else in_memory,
                disk_cache_bytes=moved if on_disk else 0,
                activation_bytes=activation_bytes,
            )


def _is_masked(model: PipelineModel, workload: Workload, group: GroupShape) -> bool:
    """Whether some batch's attention gets a mask: rows of unequal length, prompts in chunks, or windows."""
    has_windows = model.cache.movable_bytes_per_token < model.cache.bytes_per_token
    return has_windows or len(set(workload.prompt_tokens)) > 1 or group.chunk_tokens < workload.prompt_tokens[0]


def _groups(model: PipelineModel, workload: Workload, only: Sequence[tuple[int, int]] | None) -> Iterator[GroupShape]:
    """Batch sizes and numbers of batches that the requests fill, chunks, and caps on the prompt tokens of a pass."""
    count, longest = workload.num_requests, max(workload.prompt_tokens)
    chunks = [longest] if model.whole_prompts else sorted({min(chunk, longest) for chunk in CHUNK_TOKENS})
    pairs = only or [(size, n) for size in BATCH_SIZES for n in model.num_batches]
    sizes = [(min(size, count), n) for size, n in pairs]
    for size, n in sorted({(size, min(n, math.ceil(count / size))) for size, n in sizes}):
        for chunk in chunks:
            everything = size * n * chunk
            for tokens in sorted({min(everything, max(cap, size * chunk)) for cap in model.pass_tokens}):
                yield GroupShape(batch_size=size, num_batches=n, chunk_tokens=chunk, pass_tokens=tokens)
