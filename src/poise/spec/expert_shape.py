"""Which of a machine's shapes of experts is meant: the only one, or the one that somebody typed."""

from __future__ import annotations

import re

from poise.errors import MachineError
from poise.spec.curve import Shape
from poise.spec.machine import Machine


def expert_shape(machine: Machine, text: str | None, *, option: str) -> Shape:
    """``text``: as ``typed`` shows it, such as ``4096x1536:bfloat16``; None: the machine's only one. ``option``: where it is
    typed, for the message. Raises MachineError, one line that lists the machine's shapes."""
    shapes = {typed(curve.shape): curve.shape for curve in machine.devices[0].curves if curve.kind == "expert"}
    if text is None and len(shapes) == 1:
        return next(iter(shapes.values()))
    known = ", ".join(shapes) or "none"
    if text is None:
        raise MachineError(f"the machine has curves of several experts; choose one with {option}: {known}")
    found = shapes.get(re.sub(r"\s", "", text))
    if found is None:
        raise MachineError(f"{option} {text!r} is none of the machine's: {known}")
    return found


def typed(shape: Shape) -> str:
    """A shape as people write it on a command line."""
    return f"{shape.hidden}x{shape.intermediate}:{shape.dtype}"
