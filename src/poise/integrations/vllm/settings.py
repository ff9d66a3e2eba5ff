"""What the vLLM plug-in is told, by environment variables: vLLM gives a plug-in no arguments.

| variable | meaning |
|---|---|
| ``POISE_MACHINE`` | machine file, or the name of a bundled machine; a device for each rank, in order |
| ``POISE_SHAPE`` | which of its curves, ``HxI:DTYPE``; not needed where it has one |
| ``POISE_MAX_MOVES`` | most experts that change their rank in one rearrangement, all layers together |
| ``POISE_EXPERT_LOG`` | file to which the loads seen are logged |
| ``POISE_WINDOW_STEPS`` | vLLM's ``window_size``, over which it sums loads; 1000 is its default |

They are read once: a machine is fixed for a run, so that all ranks plan the same. They must be the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from poise.errors import MachineError, PoiseError, UsageError
from poise.spec.bundled import find_machine
from poise.spec.curve import Shape
from poise.spec.expert_shape import expert_shape
from poise.spec.machine import Machine

DEFAULT_WINDOW_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """``problem``: why there is no ``machine`` to plan with; then vLLM's own policy is used."""

    machine: Machine | None
    problem: str | None
    shape: Shape | None
    max_moves: int | None
    expert_log: Path | None
    window_steps: int


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Never raises: what is wrong becomes ``problem``, since a wrong file must not stop a server."""
    machine: Machine | None = None
    shape: Shape | None = None
    max_moves, window_steps = None, DEFAULT_WINDOW_STEPS
    problem: str | None = None
    try:
        window_steps = _whole(environment, "POISE_WINDOW_STEPS", least=1) or DEFAULT_WINDOW_STEPS
        max_moves = _whole(environment, "POISE_MAX_MOVES", least=0)
        if not environment.get("POISE_MACHINE"):
            raise MachineError("POISE_MACHINE is not set; name a machine file")
        found = find_machine(environment["POISE_MACHINE"])
        shape = expert_shape(found, environment.get("POISE_SHAPE") or None, option="POISE_SHAPE")
        machine = found
    except PoiseError as error:
        problem = str(error)
    log = environment.get("POISE_EXPERT_LOG")
    return Settings(
        machine=machine,
        problem=problem,
        shape=shape,
        max_moves=max_moves,
        expert_log=Path(log) if log else None,
        window_steps=window_steps,
    )


def _whole(environment: Mapping[str, str], name: str, *, least: int) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name} is {text!r}; it must be a whole number from {least}")
    return int(text)
