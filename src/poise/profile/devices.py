"""The devices that can be profiled, by their names in torch: what they are, and a clock that waits for them."""

from __future__ import annotations

import time

import torch

from poise.errors import MachineError
from poise.profile.hardware import cpu_model, memory_bytes
from poise.profile.measure import Clock


def devices_to_profile(asked: tuple[str, ...]) -> tuple[str, ...]:
    """``asked``, checked; where none is, every accelerator if there are several, else the processor.

    Raises MachineError for a device that torch does not see.
    """
    seen = tuple(f"{kind}:{index}" for kind, count in _accelerators() for index in range(count))
    for name in asked:
        if name != "cpu" and name not in seen:
            known = ", ".join(("cpu", *seen))
            raise MachineError(f"device {name!r} is not there; choose among {known}")
    return asked or (seen if len(seen) > 1 else ("cpu",))


def clock_of(device: str) -> Clock:
    """A clock that waits until the device has done what it was given."""
    if device == "cpu":
        return time.perf_counter
    target = torch.device(device)

    def clock() -> float:
        torch.accelerator.synchronize(target)
        return time.perf_counter()

    return clock


def device_bytes(device: str) -> int:
    """All memory of the device."""
    if device == "cpu":
        return memory_bytes()
    return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)


def processor_of(device: str) -> str:
    """The processor's model, or the accelerator's beside it."""
    if device == "cpu":
        return cpu_model()
    return f"{torch.cuda.get_device_name(torch.device(device))} beside {cpu_model()}"


def _accelerators() -> tuple[tuple[str, int], ...]:
    return (("cuda", torch.cuda.device_count()),) if torch.cuda.is_available() else ()
