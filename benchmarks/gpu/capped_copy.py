"""A copy within a GPU's memory by a kernel of few blocks, each of which keeps a multiprocessor's memory pipeline busy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 8192, 16
"""Words of 8 bytes that a block moves at a time."""


@triton.jit
def _copy(target, source, words, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    step = tl.num_programs(0) * BLOCK
    for offset in range(begin, words, step):
        places = offset + tl.arange(0, BLOCK)
        tl.store(target + places, tl.load(source + places, mask=places < words), mask=places < words)


def capped_copy(target: torch.Tensor, source: torch.Tensor, blocks: int) -> None:
    """``target`` and ``source``: bytes, as many, a multiple of 8."""
    target_W, source_W = target.view(torch.int64), source.view(torch.int64)
    _copy[(blocks,)](target_W, source_W, target_W.numel(), BLOCK=BLOCK, num_warps=WARPS)
