"""`poise place`: a placement of experts from recorded statistics, what it is worth, and the file that an engine loads.

Contract: everything is read and refused before anything is written; files appear whole or not at all. Standard output gets
the table or, with --json, one object; notes go to standard error. A plan that is not worth it is said to be so, and is
written all the same where --output asks for it.
Not here: planning (`plan.placement`), judging (`plan.advice`), formats (`poise.integrations`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.output import writable_file
from poise.cli.progress import say
from poise.errors import PlacementError, UsageError
from poise.units import format_bytes, format_s

if TYPE_CHECKING:
    from poise.plan.advice import PlacementAdvice
    from poise.spec.curve import Shape
    from poise.spec.machine import Machine
    from poise.spec.placement import Placement
    from poise.spec.statistics import ExpertStatistics

JSON_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """The options of the command, as typed."""

    traces: tuple[Path, ...]
    machine: str
    ranks: int
    slots_per_rank: int | None
    shape: str | None
    current: Path | None
    max_moves: int | None
    ranks_per_node: int | None
    expert_groups: int | None
    file_format: str
    first_layer: int | None
    num_layers: int | None
    output: Path | None
    report: Path | None
    json_output: bool


def run_place(options: PlaceOptions) -> None:
    """Runs the command. Raises UsageError."""
    output, report = _checked_files(options)
    from poise.integrations.files import FORMATS, read_placement, read_statistics, write_placement
    from poise.plan.placement_request import LEAST_GAIN_FRAC, MOST_RANKS
    from poise.spec.bundled import find_machine
    from poise.spec.expert_shape import expert_shape

    if options.file_format not in FORMATS:
        raise PlacementError(f"format {options.file_format!r} is not known; choose one of {', '.join(FORMATS)}")
    if not 1 <= options.ranks <= MOST_RANKS:
        raise PlacementError(f"--ranks is {options.ranks}; it must be from 1 to {MOST_RANKS}")
    whole = find_machine(options.machine)
    machine = _of_ranks(whole, options.ranks)
    shape = expert_shape(machine, options.shape, option="--shape")
    statistics = _with_layers(read_statistics(options.traces), options)
    current = None if options.current is None else read_placement(options.current, statistics, ranks=options.ranks)
    advice = _advice(options, statistics, machine, shape, current)
    placement = _placement(advice, statistics)
    if output is not None:
        num_layers = statistics.num_layers if options.num_layers is None else options.num_layers
        write_placement(placement, output, file_format=options.file_format, num_layers=num_layers)
    if report is not None:
        _write_report(report, advice, statistics, machine)
    summary = summary_of(advice, statistics, shape)
    summary["machine_devices"], summary["used_devices"] = len(whole.devices), len(machine.devices)
    summary["least_gain_frac"] = LEAST_GAIN_FRAC if options.max_moves is None else None
    _print(summary, json_output=options.json_output)
    for path in (output, report):
        if path is not None:
            say(f"wrote {path}")


def _checked_files(options: PlaceOptions) -> tuple[Path | None, Path | None]:
    if (
        options.output is not None
        and options.report is not None
        and options.output.resolve() == options.report.resolve()
    ):
        raise UsageError(f"--output and --report name the same file {options.output}; give two names")
    output = None if options.output is None else writable_file(options.output)
    if options.report is None:
        return output, None
    from poise.report.curves import require_plotly

    report = writable_file(options.report)
    require_plotly()
    return output, report


def _with_layers(statistics: ExpertStatistics, options: PlaceOptions) -> ExpertStatistics:
    """With absolute layer ids."""
    if statistics.are_absolute:
        return statistics
    if options.first_layer is None:
        raise UsageError(
            f"the {statistics.source} counts MoE layers only; say with --first-layer which layer of the model is the "
            "first of them (0 where all layers have experts)"
        )
    if options.first_layer < 0:
        raise UsageError(f"--first-layer is {options.first_layer}; it must be 0 or more")
    return statistics.with_absolute_layers(options.first_layer)


def _of_ranks(machine: Machine, ranks: int) -> Machine:
    """The first devices, where there are more of them than ranks."""
    from dataclasses import replace

    return machine if ranks >= len(machine.devices) else replace(machine, devices=machine.devices[:ranks], links=())


def _advice(
    options: PlaceOptions, statistics: ExpertStatistics, machine: Machine, shape: Shape, current: Placement | None
) -> PlacementAdvice:
    from poise.plan.advice import advise
    from poise.plan.placement_request import PlacementRequest, bytes_of
    from poise.plan.rank_costs import RankCosts

    slots_per_rank = options.slots_per_rank
    if slots_per_rank is None:
        slots_per_rank = -(-statistics.num_experts // options.ranks) if current is None else current.slots_per_rank
    costs = RankCosts.of_machine(machine, ranks=options.ranks, shape=shape)
    request = PlacementRequest(
        load_LE=statistics.load_LE,
        num_ranks=options.ranks,
        slots_per_rank=slots_per_rank,
        current_LS=None if current is None else current.slot_to_expert_LS,
        max_moves=options.max_moves,
        ranks_per_node=options.ranks_per_node,
        expert_groups=options.expert_groups,
    )
    return advise(statistics.load_NLE, request, costs, expert_bytes=bytes_of(shape))


def _placement(advice: PlacementAdvice, statistics: ExpertStatistics) -> Placement:
    import numpy as np

    from poise.spec.placement import Placement

    return Placement(
        slot_to_expert_LS=advice.plan.slot_to_expert_LS.astype(np.int32),
        layers=statistics.layers,
        num_experts=statistics.num_experts,
        ranks=advice.plan.num_ranks,
    )


def _write_report(path: Path, advice: PlacementAdvice, statistics: ExpertStatistics, machine: Machine) -> None:
    from poise.report.placement import write_placement_page

    devices = machine.devices
    names = [f"rank {rank} {devices[rank % len(devices)].name}" for rank in range(advice.plan.num_ranks)]
    write_placement_page(
        path,
        before_s_LR=advice.now_s_LR,
        after_s_LR=advice.plan.predicted_s_LR,
        layers=statistics.layers,
        devices=names,
        title=f"Predicted time of experts in a mean step: {format_s(advice.now_s)} before, {format_s(advice.planned_s)} after",
    )


def summary_of(advice: PlacementAdvice, statistics: ExpertStatistics, shape: Shape) -> dict[str, Any]:
    """What --json prints. Times are of one mean step over all MoE layers, in seconds."""
    plan, moves = advice.plan, advice.plan.moves
    rows = zip(
        statistics.layers,
        advice.now_s_LR.max(axis=1).tolist(),
        plan.predicted_s_L.tolist(),
        advice.token_balanced_s_LR.max(axis=1).tolist(),
        plan.bound_s_L.tolist(),
        strict=True,
    )
    names = ("layer", "now_s", "planned_s", "token_balanced_s", "bound_s")
    return {
        "version": JSON_VERSION,
        "statistics": statistics.source,
        "steps": statistics.steps,
        "shape": str(shape),
        "experts": statistics.num_experts,
        "ranks": plan.num_ranks,
        "slots_per_rank": plan.slots_per_rank,
        "now": "contiguous" if moves is None else "current",
        "now_s": advice.now_s,
        "planned_s": advice.planned_s,
        "token_balanced_s": advice.token_balanced_s,
        "bound_s": advice.bound_s,
        "gain_frac": advice.gain_frac,
        "noise_frac": advice.noise_frac,
        "held_out_gains": list(advice.held_out_gains),
        "is_worth_it": advice.is_worth_it,
        "moves": None if moves is None else len(moves),
        "moved_bytes": None if moves is None else moves.nbytes,
        "layers": [dict(zip(names, row, strict=True)) for row in rows],
    }


def _print(summary: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{summary['experts']} experts of {summary['shape']} in {len(summary['layers'])} layers on {summary['ranks']} ranks "
        f"of {summary['slots_per_rank']} slots; {summary['statistics']}, {summary['steps']} steps"
    )
    table = Table(title=title, title_justify="left")
    for column in ("placement", "experts' time in a mean step", "over the bound"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for label, key in (
        (f"now ({summary['now']})", "now_s"),
        ("token-balanced (EPLB)", "token_balanced_s"),
        ("planned", "planned_s"),
        ("bound", "bound_s"),
    ):
        over = summary[key] / summary["bound_s"] if summary["bound_s"] else 1.0
        table.add_row(label, format_s(summary[key]), f"{over:.3f}")
    console = Console()
    console.print(table)
    if summary["used_devices"] < summary["machine_devices"]:
        first, of = summary["used_devices"], summary["machine_devices"]
        console.print(f"Of the machine's {of} devices the first {first} are used.", highlight=False, soft_wrap=True)
    for line in _sentences(summary):
        console.print(line, highlight=False, soft_wrap=True)


def _sentences(summary: dict[str, Any]) -> tuple[str, str]:
    """The moves, and the verdict with what noise is."""
    if summary["moves"] is None:
        moves = "Moves: not counted, as no --current is given; an engine that starts with the file moves nothing."
    else:
        least = summary["least_gain_frac"]
        why = "--max-moves" if least is None else f"each saves {least:.2%} of its layer's time or more"
        moves = f"Moves: {summary['moves']} experts change their rank, {format_bytes(summary['moved_bytes'])} ({why})."
    stretches = len(summary["held_out_gains"])
    how = f"on steps the plan has not seen, {stretches} stretches" if stretches else "one step only, not held out"
    gain = f"gain {summary['gain_frac']:.1%} ({how})"
    noise = f"noise of {summary['noise_frac']:.1%} (95 % interval, at least 1 %)"
    if summary["is_worth_it"]:
        return moves, f"Worth it: {gain}, above the {noise}."
    return moves, f"Leave it: {gain}, within the {noise}."
