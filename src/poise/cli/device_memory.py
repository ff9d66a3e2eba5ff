"""What ``--device-memory`` may be, said before anything slow is done."""

from __future__ import annotations

from poise.errors import UsageError
from poise.units import parse_bytes


def check_device_memory(device: str, device_memory: str, *, is_rank: bool = False) -> None:
    """Raises UsageError for a size that is none, and for one that no device is meant by. Ranks take ``--memory`` for theirs."""
    if device_memory == "auto":
        return
    parse_bytes(device_memory)
    if is_rank:
        raise UsageError(
            "--device-memory does not go with --expert-parallel: --memory is of a rank's device; leave it out"
        )
    if device != "cuda":
        raise UsageError(
            f"--device-memory is of a GPU, and the device is {device!r}; give --device cuda as well, or leave it out"
        )
