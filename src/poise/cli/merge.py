"""`poise profile --merge`: machine files of single devices put together, and how far the devices are apart.

Contract: as `poise profile`: files are read and refused before anything is written, and appear whole or not at all.
Not here: measuring, and the rules of putting together (`poise.profile.merge`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.output import writable_file
from poise.cli.progress import say
from poise.errors import UsageError
from poise.units import format_s

if TYPE_CHECKING:
    from rich.table import Table

    from poise.profile.merge import Spread
    from poise.spec.machine import Machine

JSON_VERSION = 1


def run_merge(*, files: Sequence[str], output: Path | None, report: Path | None, json_output: bool) -> None:
    """Runs the command. Raises UsageError."""
    from poise.profile.merge import merge_machines, spreads
    from poise.spec.machine import Machine

    if output is not None and report is not None and output.resolve() == report.resolve():
        raise UsageError(f"--output and --report name the same file {output}; give two names")
    output = None if output is None else writable_file(output)
    if report is not None:
        from poise.report.curves import require_plotly

        report = writable_file(report)
        require_plotly()
    machine = merge_machines([Machine.load(Path(file)) for file in files], files)
    if output is not None:
        machine.save(output)
    if report is not None:
        from poise.report.curves import write_curves

        write_curves(machine, report)
    _print(machine, spreads(machine), json_output=json_output)
    for path in (output, report):
        if path is not None:
            say(f"wrote {path}")


def _print(machine: Machine, found: Sequence[Spread], *, json_output: bool) -> None:
    if json_output:
        print(json.dumps(merge_as_json(machine, found)))
        return
    from rich.console import Console

    Console().print(spread_table(machine, found))


def spread_table(machine: Machine, found: Sequence[Spread]) -> Table:
    """A row for each load: every device's time over the fastest one's."""
    from rich.table import Table

    table = Table(title="Time of experts on each device, over the fastest one's", title_justify="left")
    for column in ("experts", "tokens", "fastest", *(device.name for device in machine.devices), "spread"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    for spread in found:
        ratios = [f"{ratio:.3f}" for ratio in spread.over_fastest_D]
        widest = f"{max(spread.over_fastest_D) - 1:.1%}"
        tokens = str(spread.tokens) if spread.active == 1 else f"{spread.tokens} on {spread.active}"
        table.add_row(str(spread.shape), tokens, format_s(min(spread.seconds_D)), *ratios, widest)
    return table


def merge_as_json(machine: Machine, found: Sequence[Spread]) -> dict[str, Any]:
    """What --json prints: the machine as in its file, and the seconds of every device at each load."""
    return {"version": JSON_VERSION, "machine": machine.to_json(), "spread": spread_rows(machine, found)}


def spread_rows(machine: Machine, found: Sequence[Spread]) -> list[dict[str, Any]]:
    """The seconds of every device at each load."""
    names = [device.name for device in machine.devices]
    return [
        {
            "shape": str(spread.shape),
            "tokens": spread.tokens,
            "active": spread.active,
            "seconds": dict(zip(names, spread.seconds_D, strict=True)),
            "spread_frac": max(spread.over_fastest_D) - 1,
        }
        for spread in found
    ]
