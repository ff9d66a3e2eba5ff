"""What is to be generated, and the passes that it takes: prompts in chunks, then a pass for every further token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from poise.plan.group import GroupShape
from poise.plan.passes import PassShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Tokens of each prompt, and the most that each may be continued by."""

    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]

    @property
    def num_requests(self) -> int:
        """How many there are."""
        return len(self.prompt_tokens)

    @property
    def total_tokens(self) -> list[int]:
        """Prompt and continuation of each request."""
        return [prompt + new for prompt, new in zip(self.prompt_tokens, self.new_tokens, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """``passes`` passes of one shape; a fraction where rows end at different lengths."""

    passes: float
    shape: PassShape


def stages(workload: Workload, group: GroupShape) -> Iterator[Stage]:
    """The run in waves of as many requests as run at once, each of the mean length: an estimate, not the loop itself."""
    count = workload.num_requests
    prompt, new = sum(workload.prompt_tokens) / count, sum(workload.new_tokens) / count
    for rows, waves in ((group.max_rows, count // group.max_rows), (count % group.max_rows, 1)):
        if not rows or not waves:
            continue
        per_pass = max(1, min(group.pass_tokens, rows * group.chunk_tokens))
        passes = max(math.ceil(rows * prompt / per_pass), math.ceil(prompt / group.chunk_tokens))
        yield Stage(
            passes=waves * passes,
            shape=PassShape(
                batch_size=group.batch_size,
                decode_rows=0,
                prefill_tokens=math.ceil(rows * prompt / passes),
                chunk_tokens=group.chunk_tokens,
                context_tokens=max(1, round(prompt / 2)),
            ),
        )
        if new > 1:
            yield Stage(passes=waves * (new - 1), shape=_decode(workload, group, rows))


def decode_shape(workload: Workload, group: GroupShape) -> PassShape:
    """A pass in which every row that can run at once decodes."""
    return _decode(workload, group, min(group.max_rows, workload.num_requests))


def _decode(workload: Workload, group: GroupShape, rows: int) -> PassShape:
    count = workload.num_requests
    context = (sum(workload.prompt_tokens) + sum(workload.new_tokens) / 2) / count
    return PassShape(
        batch_size=group.batch_size,
        decode_rows=rows,
        prefill_tokens=0,
        chunk_tokens=group.chunk_tokens,
        context_tokens=max(1, round(context)),
    )
