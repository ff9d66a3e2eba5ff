"""What a rank computes on: the CPU, or with ``cuda`` the GPU of its number on this host. What is there of it, and what is used.

Several ranks on GPUs have never been run: what is here follows torch's documentation.
"""

from __future__ import annotations

import torch

from poise.engine.footprint import AUTO_MARGIN_FRAC, automatic_budget_bytes, peak_resident_bytes
from poise.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


def device_for(asked: str, local_rank: int) -> torch.device:
    """``auto`` is the CPU. Raises UsageError for a device that is not known, or not there."""
    if asked not in DEVICES:
        raise UsageError(f"device {asked!r} is not known; ranks compute on one of {', '.join(DEVICES)}")
    if asked != "cuda":
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= there:
        raise UsageError(
            f"device 'cuda' for local rank {local_rank}, but this host has {there} GPUs that torch can use; "
            "start as many ranks as there are GPUs, or give --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def budget_for(memory: str | int, device: torch.device, *, local_ranks: int) -> str | int:
    """``auto``: what is free, less a margin, of a GPU's memory, or an even part of the host's. All else as it is given."""
    if memory != "auto":
        return memory
    if device.type != "cuda":
        return automatic_budget_bytes() // local_ranks
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes * (1.0 - AUTO_MARGIN_FRAC))


def peak_bytes_on(device: torch.device, *, base_bytes: int) -> int:
    """The most that was in use, on top of what the process held before: on a GPU what torch's allocator gave out."""
    if device.type != "cuda":
        return peak_resident_bytes()
    return base_bytes + torch.cuda.max_memory_allocated(device)
