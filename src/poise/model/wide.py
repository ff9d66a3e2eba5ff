"""bf16 matrices multiplied in fp32 where this processor is faster at that, block by block, so that little memory is needed.

Without tile instructions (AMX) some processors compute bf16 products slower than fp32 ones: AVX-512's bf16 has no more
multiply-adds in a cycle, and oneDNN rearranges the weights besides. With many rows a product in fp32, the weights made fp32 a
block at a time, takes two thirds of the time (decision 027), and sums are rounded once less. Whether it pays is measured, once
in a process; the margin is so wide that a machine always decides alike.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from poise.plan.memory import WIDE_BLOCK_BYTES

WIDE_ROWS = 48
"""Rows from which making the matrix fp32 costs less than it saves."""
FASTER = 1.15
TIMED_ROWS, TIMED_SIDE, ROUNDS = 256, 1024, 8
"""Both ways take turns: 60 ms in all. Three rounds of 2 ms on end lay within one disturbance in a process of ten, which then
computed experts at two thirds of the speed to its end."""


@functools.cache
def widening_pays() -> bool:
    """Whether bf16 products of many rows are faster in fp32 on this processor, with the threads that torch has now."""
    rows = torch.zeros(TIMED_ROWS, TIMED_SIDE, dtype=torch.bfloat16)
    weight = torch.zeros(TIMED_SIDE, TIMED_SIDE, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain_s, wide_s = _best_s(
            lambda: nn.functional.linear(rows, weight), lambda: wide_linear(rows.float(), weight).to(torch.bfloat16)
        )
    return plain_s > FASTER * wide_s


def is_wide(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of so many rows is computed in fp32."""
    return rows >= WIDE_ROWS and dtype == torch.bfloat16 and device.type == "cpu" and widening_pays()


def wide_linear(rows_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 rows times a bf16 matrix (any strides), as fp32, into ``out_TN`` where that is given."""
    outputs, inputs = weight_NK.shape
    result_TN = rows_TK.new_empty(len(rows_TK), outputs) if out_TN is None else out_TN
    step = min(outputs, max(1, WIDE_BLOCK_BYTES // (4 * inputs)))
    block = rows_TK.new_empty(step, inputs)
    for begin in range(0, outputs, step):
        end = min(begin + step, outputs)
        wide = block[: end - begin].copy_(weight_NK[begin:end])
        torch.mm(rows_TK, wide.t(), out=result_TN[:, begin:end])
    return result_TN


class WideLinear(nn.Linear):
    """A bf16 linear layer whose products of many rows are computed in fp32; its weights and results stay bf16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name is torch's
        count = input.numel() // self.in_features
        if not is_wide(count, input.dtype, input.device) or self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        result_TN = wide_linear(input.reshape(count, self.in_features).float(), self.weight)
        if self.bias is not None:
            result_TN += self.bias
        return result_TN.to(input.dtype).view(*input.shape[:-1], -1)


def widen_linears(model: nn.Module) -> None:
    """Has the model's own linear layers computed so where it pays: they change their class and nothing else."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear


def _best_s(*runs: Callable[[], Any]) -> list[float]:
    """Of each, the fastest round but the first."""
    rounds: list[list[float]] = []
    for _ in range(1 + ROUNDS):
        rounds.append([])
        for run in runs:
            begin_s = time.perf_counter()
            run()
            rounds[-1].append(time.perf_counter() - begin_s)
    return [min(each) for each in zip(*rounds[1:], strict=True)]
