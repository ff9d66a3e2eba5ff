"""What a rank computes on, and what carries its tokens: the CPU, or with ``cuda`` the GPU of its number on this host.

Where a host has more ranks than GPUs, ranks share them, each a like part of its memory. What is there of it, and what is used.
"""

from __future__ import annotations

import logging

import torch

from poise.engine.footprint import AUTO_MARGIN_FRAC, automatic_budget_bytes, peak_resident_bytes
from poise.errors import UsageError
from poise.parallel.carrier import GLOO, GLOO_THROUGH_HOST, NCCL, Carrier
from poise.parallel.launch import Launch

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")


def device_for(asked: str, launch: Launch) -> torch.device:
    """``auto`` is the CPU. Raises UsageError for a device that is not known, or not there."""
    if asked not in DEVICES:
        raise UsageError(f"device {asked!r} is not known; ranks compute on one of {', '.join(DEVICES)}")
    if asked != "cuda":
        return torch.device("cpu")
    if not num_gpus():
        raise UsageError("device 'cuda', but this host has no GPU that torch can use; give --device cpu")
    device = torch.device("cuda", launch.local_rank % num_gpus())
    torch.cuda.set_device(device)
    return device


def carrier_for(device: torch.device, launch: Launch) -> Carrier:
    """NCCL for ranks that have a GPU each. It refuses ranks that share one: then Gloo, and tokens go through host memory, which
    is said once."""
    if device.type != "cuda":
        return GLOO
    if launch.local_ranks <= num_gpus():
        return NCCL
    if launch.local_rank == 0:
        logger.warning(
            "%d ranks share %d GPU%s, which NCCL refuses: tokens go through host memory (Gloo), far slower",
            launch.local_ranks,
            num_gpus(),
            "s" * (num_gpus() > 1),
        )
    return GLOO_THROUGH_HOST


def num_gpus() -> int:
    """Of this host, that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def budget_for(memory: str | int, device: torch.device, *, local_ranks: int) -> str | int:
    """``auto``: an even part of what is free, less a margin, of a GPU's memory or of the host's. All else as it is given."""
    if memory != "auto":
        return memory
    if device.type != "cuda":
        return automatic_budget_bytes() // local_ranks
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes * (1.0 - AUTO_MARGIN_FRAC)) // -(-local_ranks // num_gpus())


def peak_bytes_on(device: torch.device, *, base_bytes: int) -> int:
    """The most that was in use, on top of what the process held before: on a GPU what torch's allocator gave out."""
    if device.type != "cuda":
        return peak_resident_bytes()
    return base_bytes + torch.cuda.max_memory_allocated(device)
