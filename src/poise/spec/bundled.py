"""The machines that come with Poise, by name, and the one way in which a command finds a machine: ``--machine NAME|FILE``.

They are ``machine.json`` files like any other; what they rest on is in their ``source`` and in docs/machines.md.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from poise.errors import MachineError
from poise.spec.machine import Machine

_FOLDER = files("poise") / "assets" / "machines"


def bundled_machines() -> tuple[str, ...]:
    """Their names."""
    return tuple(
        sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
    )


def find_machine(name_or_file: str) -> Machine:
    """A bundled machine by its name, else the machine file. Raises MachineError, one line, if it is neither."""
    names = bundled_machines()
    if name_or_file in names:
        content = json.loads((_FOLDER / f"{name_or_file}.json").read_bytes())
        return Machine.from_json(content, f"bundled machine {name_or_file}")
    if not Path(name_or_file).exists():
        raise MachineError(f"machine {name_or_file!r} is neither a file nor one of {', '.join(names)}")
    return Machine.load(Path(name_or_file))
