"""`poise profile`: measures this machine and says what it found, as a table, a machine file, a page of plots.

Contract: everything that can be refused before measuring is refused first; files appear whole or not at all, so Ctrl-C
leaves none. Standard output gets the table or, with --json, one object; the progress bar and notes go to standard error.
Not here: how anything is measured (`poise.profile`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.output import writable_file
from poise.errors import UsageError
from poise.profile.measure import interval_rank
from poise.units import format_s

if TYPE_CHECKING:
    from rich.table import Table

    from poise.profile.measure import Measurement
    from poise.profile.run import Effort, Profile, TimedPoint

JSON_VERSION = 1


def run_profile(
    *,
    model: str | None,
    output: Path | None,
    report: Path | None,
    json_output: bool,
    devices: Sequence[str] = (),
    effort: Effort | None = None,
) -> None:
    """Runs the command. ``devices``: none is all accelerators, where there are several, else the processor. ``effort``: None
    is ``THOROUGH``. Raises UsageError or ReadError."""
    if output is not None and report is not None and output.resolve() == report.resolve():
        raise UsageError(f"--output and --report name the same file {output}; give two names")
    output = writable_file(output) if output is not None else None
    if report is not None:
        from poise.report.curves import require_plotly

        report = writable_file(report)
        require_plotly()
    if model is not None:
        from poise.model.hub import find_checkpoint

        find_checkpoint(model)
    profile = _measured(model, devices, effort)
    if output is not None:
        profile.machine.save(output)
    if report is not None:
        from poise.report.curves import write_curves

        write_curves(profile.machine, report)
    _print(profile, json_output=json_output)
    for note in profile.notes:
        _say(note)
    for path in (output, report):
        if path is not None:
            _say(f"wrote {path}")


def only_model(models: Sequence[str]) -> str | None:
    """The model to profile. Raises UsageError for more than one."""
    if len(models) > 1:
        raise UsageError(f"{len(models)} models are given; profile one, or put machine files together with --merge")
    return models[0] if models else None


def _measured(model: str | None, devices: Sequence[str], effort: Effort | None) -> Profile:
    from poise.profile.progress import progress_bar

    with progress_bar("Profiling") as on_progress:
        on_progress("loading", 0.0)
        from poise.engine.dtype import choose_for_device
        from poise.profile.devices import devices_to_profile
        from poise.profile.run import THOROUGH
        from poise.profile.several import profile_devices
        from poise.profile.subject import default_subjects, subject_of_checkpoint

        chosen = devices_to_profile(tuple(devices))
        if model is None:
            subjects = default_subjects()
        else:
            subjects = (
                subject_of_checkpoint(model, dtype_for=lambda own: choose_for_device(own, is_asked_for=False).dtype),
            )
        return profile_devices(subjects, effort or THOROUGH, chosen, on_progress=on_progress)


def _print(profile: Profile, *, json_output: bool) -> None:
    if json_output:
        print(json.dumps(profile_as_json(profile)))
        return
    from rich.console import Console

    measured = profile.machine.measured
    assert measured is not None, "a profile knows where it comes from"
    from poise.cli.merge import spread_table
    from poise.profile.merge import spreads

    console = Console()
    console.print(f"{measured.cpu}, {measured.threads} threads, torch {measured.torch}", highlight=False)
    for table in _tables(profile):
        console.print(table)
    if len(profile.machine.devices) > 1:
        console.print(spread_table(profile.machine, spreads(profile.machine)))
    for tier in profile.machine.tiers:
        job = "copies in memory" if tier.name == "dram" else "reads of experts, the engine's reader"
        console.print(f"{tier.name}: {tier.bytes_per_s / 1e9:.2f} GB/s ({job})", highlight=False)


def profile_as_json(profile: Profile) -> dict[str, Any]:
    """What --json prints: the machine as in its file, every point with its 95 % interval, the notes, and how far apart
    several devices are."""
    points = [{**asdict(point), "is_certain": point.time.is_certain} for point in profile.points]
    from poise.cli.merge import spread_rows
    from poise.profile.merge import spreads

    return {
        "version": JSON_VERSION,
        "machine": profile.machine.to_json(),
        "points": points,
        "notes": list(profile.notes),
        "spread": spread_rows(profile.machine, spreads(profile.machine)) if len(profile.machine.devices) > 1 else [],
    }


def _tables(profile: Profile) -> Iterator[Table]:
    """A table for each device, kind of work and shape."""
    groups: dict[str, list[TimedPoint]] = {}
    for point in profile.points:
        where = f"{point.device}: " if len(profile.machine.devices) > 1 else ""
        groups.setdefault(f"{where}{point.kind} {point.shape}", []).append(point)
    for title, points in groups.items():
        yield _table(title, points)


def _table(title: str, points: Sequence[TimedPoint]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    extra = {"expert": ("active",), "attention": ("context", "tokens a row")}.get(points[0].kind, ())
    for column in ("tokens", *extra, "time", "±"):
        table.add_column(column, justify="right")
    if points[0].flops is not None:
        table.add_column("GFLOP/s", justify="right")
    for point in points:
        time = point.time
        values: dict[str, object] = {
            "active": point.active,
            "context": point.context_tokens,
            "tokens a row": point.row_tokens,
        }
        row = [str(point.tokens), *(str(values[name]) for name in extra)]
        row += [format_s(time.seconds), _spread(time)]
        if point.flops is not None:
            row.append(f"{point.flops / time.seconds / 1e9:.3g}")
        table.add_row(*row)
    return table


def _spread(time: Measurement) -> str:
    """How far the 95 % interval reaches; with few runs there is none."""
    if interval_rank(time.runs) == 0:
        return f"{time.runs} run{'s' * (time.runs > 1)}"
    reach = max(time.high_s - time.seconds, time.seconds - time.low_s) / time.seconds
    return f"{reach:.0%}" + ("" if time.is_certain else " ?")


def _say(message: str) -> None:
    print(f"poise: {message}", file=sys.stderr, flush=True)
