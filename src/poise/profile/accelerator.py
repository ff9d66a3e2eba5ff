"""What a GPU does, in four numbers: its bus, its memory, its products, and what it costs to ask for one. Takes a second.

Enough to choose batches and slots by, where experts are copied to it. The CPU in the part of a device is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from poise.units import MIB

COPIED_BYTES = 32 * MIB
PRODUCT_ROWS = 512
ROUNDS = 5
LAUNCHES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceleratorRates:
    """``copy_bytes_per_s``: from pinned memory to the device; ``launch_s``: of the host's time, for each kernel."""

    copy_bytes_per_s: float
    memory_bytes_per_s: float
    flops_per_s: float
    launch_s: float
    source: str


NOT_MEASURED = AcceleratorRates(
    copy_bytes_per_s=10e9,
    memory_bytes_per_s=10e9,
    flops_per_s=100e9,
    launch_s=0.0,
    source="estimated (the CPU in the part of a device)",
)


def accelerator_rates(device: torch.device, dtype: torch.dtype, *, shape: Sequence[int]) -> AcceleratorRates:
    """Measures a GPU with a product of one matrix, ``shape`` (outputs, inputs); leaves nothing on it."""
    if device.type != "cuda":
        return NOT_MEASURED
    with torch.inference_mode(), torch.cuda.device(device):
        rates = _measured(device, torch.zeros(*shape, dtype=dtype, device=device))
    torch.cuda.empty_cache()
    return rates


def _measured(device: torch.device, weight: torch.Tensor) -> AcceleratorRates:
    row, rows = (torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=device) for count in (1, PRODUCT_ROWS))
    one_s = _least_s(device, lambda: torch.nn.functional.linear(row, weight))
    many_s = _least_s(device, lambda: torch.nn.functional.linear(rows, weight))
    return AcceleratorRates(
        copy_bytes_per_s=copy_rate(device),
        memory_bytes_per_s=weight.nbytes / one_s,
        flops_per_s=2.0 * PRODUCT_ROWS * weight.numel() / many_s,
        launch_s=_launch_s(row),
        source=f"measured on {torch.cuda.get_device_name(device)}",
    )


def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned memory to the device, the best of some rounds."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    return COPIED_BYTES / _least_s(device, lambda: into.copy_(source, non_blocking=True))


def _least_s(device: torch.device, run: Callable[[], object]) -> float:
    """Of the device's time, the best round but the first."""
    times = []
    for _ in range(1 + ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return min(times[1:])


def _launch_s(row: torch.Tensor) -> float:
    """Of the host's time, for one kernel that does next to nothing."""
    times = []
    for _ in range(2):
        torch.cuda.synchronize(row.device)
        began_s = time.perf_counter()
        for _ in range(LAUNCHES):
            row.add_(0.0)
        torch.cuda.synchronize(row.device)
        times.append((time.perf_counter() - began_s) / LAUNCHES)
    return min(times)
