"""Rules that the numbers of a machine obey; each raises MachineError with the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from poise.errors import MachineError


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise MachineError(f"{name} is {value!r}; it must be {allowed}")


def require_positive(value: float, name: str) -> None:
    require(math.isfinite(value) and value > 0, name, value, "above 0")


def require_distinct(what: str, names: Iterable[object]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise MachineError(f"there are two {what} {name!r}; keep one")
        seen.add(name)
