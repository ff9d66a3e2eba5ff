"""Which number type a checkpoint is computed in on this device, and why: the user's choice, else the checkpoint's own unless
this device computes it far slower than one that does as well.

fp32 is never lowered. fp16 becomes bf16, and bf16 fp32, where the processor has so little arithmetic for them that half the
bytes do not make up for it. Rates are measured, in milliseconds; the margin is so wide that a machine always decides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FAR_SLOWER = 5.0
"""A type is left when it is this many times slower. Measured ratios lie far to either side (decision 008)."""
ROWS, SIDE, ROUNDS = 32, 1024, 3
"""The product that is timed: an expert's over a few tokens."""

Rate = Callable[[torch.dtype], float]
"""Multiply-adds per second of a matrix product in a dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DtypeChoice:
    """What is computed in, and the reason in words."""

    dtype: torch.dtype
    reason: str


def choose_for_device(own: torch.dtype, *, is_asked_for: bool, rate: Rate | None = None) -> DtypeChoice:
    """``own``: the checkpoint's dtype, or the one that was asked for. ``rate`` is ``measured_rate`` unless it is given."""
    name, rate = name_of(own), rate or measured_rate
    if is_asked_for:
        return DtypeChoice(dtype=own, reason="as asked for")
    if own == torch.float32:
        return DtypeChoice(dtype=own, reason="checkpoint is float32, which is never lowered unasked")
    other = torch.bfloat16 if own == torch.float16 else torch.float32
    times_slower = rate(other) / rate(own)
    if times_slower < FAR_SLOWER:
        return DtypeChoice(dtype=own, reason=f"checkpoint is {name}, which this CPU computes well")
    return DtypeChoice(
        dtype=other, reason=f"checkpoint is {name}, which this CPU computes {times_slower:.1f} times slower"
    )


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def measured_rate(dtype: torch.dtype) -> float:
    """The best of ``ROUNDS`` products, after one that compiles the kernel."""
    rows, weight = torch.zeros(ROWS, SIDE, dtype=dtype), torch.zeros(SIDE, SIDE, dtype=dtype)
    seconds = []
    for _ in range(1 + ROUNDS):
        begin_s = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        seconds.append(time.perf_counter() - begin_s)
    return ROWS * SIDE * SIDE / min(seconds[1:])
