"""Everything that is measured of a machine for some models, and the Machine that it makes.

Each kind of work is one group of cases that take turns (``profile.measure``), with a cap on its time. What a cap cut short is
in the result with its interval, and counted in the notes: nothing that was not measured is made up.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from poise.model.checkpoint import TensorRef
from poise.profile.devices import device_bytes, processor_of
from poise.profile.experts import expert_run, load_experts
from poise.profile.hardware import memory_bytes
from poise.profile.layers import Layers
from poise.profile.measure import Clock, Measurement, Run, measure
from poise.profile.rates import COPY_BYTES, ExpertReads, copy_run, scratch_experts
from poise.profile.subject import Subject
from poise.spec.curve import Curve, CurveKind, Point, Shape
from poise.spec.machine import Device, Machine, Provenance, Tier
from poise.units import GIB, MIB

OnProgress = Callable[[str, float], None]
"""(what is being measured, share of all that is done)."""

HEAD_ROWS = 16_384
"""Rows of the vocabulary's matrix that are multiplied; the whole takes proportionally longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much is measured. ``cap_s`` bounds all of one model's cases; each is run once or twice at least.

    ``max_flops`` leaves out larger runs. ``scratch_bytes`` bounds each: the experts, a cache, the buffers that are copied.
    """

    expert_tokens: tuple[int, ...]
    grouped: tuple[tuple[int, int], ...]
    """(tokens per expert, active experts) beyond one active expert."""
    decode_rows: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    prefill_row_tokens: int
    prefill_rows: tuple[int, ...]
    prefill_contexts: tuple[int, ...]
    head_tokens: tuple[int, ...]
    cap_s: float
    max_flops: float
    scratch_bytes: int


QUICK = Effort(
    expert_tokens=(1, 4, 16, 64, 256, 512),
    grouped=((1, 8), (16, 8)),
    decode_rows=(1, 8, 32),
    decode_contexts=(64, 256),
    prefill_row_tokens=64,
    prefill_rows=(1, 4),
    prefill_contexts=(64, 256),
    head_tokens=(1, 16, 64),
    cap_s=6.0,
    max_flops=2e10,
    scratch_bytes=256 * MIB,
)
THOROUGH = Effort(
    expert_tokens=tuple(sorted([2**k for k in range(13)] + [3 * 2**k for k in range(11)])),
    grouped=tuple((tokens, active) for active in (4, 16) for tokens in (1, 4, 16, 64)),
    decode_rows=(1, 4, 16, 64),
    decode_contexts=(64, 256, 1024),
    prefill_row_tokens=128,
    prefill_rows=(1, 4, 16),
    prefill_contexts=(128, 512),
    head_tokens=(1, 4, 16, 64, 256),
    cap_s=60.0,
    max_flops=4e11,
    scratch_bytes=GIB,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPoint:
    """One point of a curve and how certain it is. ``flops`` of the products with weights; None where they are not counted."""

    kind: CurveKind
    shape: Shape
    tokens: int
    time: Measurement
    active: int = 1
    context_tokens: int | None = None
    row_tokens: int | None = None
    flops: float | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The machine, and what it was made of. ``disk``: runs of reads; ``notes``: what a reader of the figures must know."""

    machine: Machine
    points: tuple[TimedPoint, ...]
    disk: Measurement
    notes: tuple[str, ...]


def profile_machine(
    subjects: Sequence[Subject],
    effort: Effort,
    *,
    on_progress: OnProgress,
    clock: Clock = time.perf_counter,
    device: str = "cpu",
) -> Profile:
    """Measures the shapes of ``subjects``, copies in memory, and reads: of the first one's experts, or of a scratch file.

    ``device``: as torch names it, where the shapes are measured; ``clock`` must wait for its work (``clock_of``).
    torch's threads are left as they are, and recorded. Raises ReadError, or UsageError without a disk for scratch files.
    """
    groups = 3 * len(subjects) + 2
    done = 0

    def group(label: str, share: float, cases: Sequence[Run]) -> list[tuple[Measurement, ...]]:
        nonlocal done
        report = _share_of(label, done, groups, on_progress)
        measured = measure(cases, cap_s=share * effort.cap_s, clock=clock, on_progress=report)
        done += 1
        return measured

    points: list[TimedPoint] = []
    for subject in subjects:
        for measured in (_expert_points, _layer_points, _head_points):
            points += measured(subject, effort, clock, group, device)
    points = [replace(point, device=device) for point in points]
    copy_bytes = min(COPY_BYTES, effort.scratch_bytes // 2)
    ((copy,),) = group("copies in memory", 0.06, [copy_run(copy_bytes, clock)])
    disk, reads, notes = _disk(subjects, clock, group)
    measured_device = Device(name=device, memory_bytes=device_bytes(device), curves=tuple(_curves(points)))
    dram = Tier(name="dram", capacity_bytes=memory_bytes(), bytes_per_s=copy_bytes / copy.seconds)
    machine = Machine(devices=(measured_device,), tiers=(dram, disk), measured=provenance(device))
    return Profile(machine=machine, points=tuple(points), disk=reads, notes=(*_notes(points, subjects), *notes))


def provenance(device: str = "cpu") -> Provenance:
    """What is measured on and with, now."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=processor_of(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        poise=_poise_version(),
    )


def _poise_version() -> str:
    try:
        return metadata.version("poise")
    except metadata.PackageNotFoundError:
        return "not installed"  # run from its sources


Group = Callable[[str, float, Sequence[Run]], list[tuple[Measurement, ...]]]
"""(label, share of the time for a model, cases) to their measurements."""


def _expert_points(subject: Subject, effort: Effort, clock: Clock, group: Group, device: str) -> Iterator[TimedPoint]:
    experts = load_experts(subject, scratch_bytes=effort.scratch_bytes, device=device)
    each = subject.expert_flops_per_token
    grid = [(tokens, 1) for tokens in effort.expert_tokens]
    grid += [(tokens * active, active) for tokens, active in effort.grouped if active <= experts.num_experts]
    grid = [(tokens, active) for tokens, active in grid if tokens == active or tokens * each <= effort.max_flops]
    runs = [
        expert_run(subject, experts, tokens=tokens, active=active, clock=clock, device=device)
        for tokens, active in grid
    ]
    for (tokens, active), (time_s,) in zip(grid, group(f"{subject.name}: experts", 0.3, runs), strict=True):
        yield TimedPoint(
            kind="expert",
            shape=subject.expert_shape,
            tokens=tokens,
            active=active,
            time=time_s,
            flops=float(tokens * each),
        )


def _layer_points(subject: Subject, effort: Effort, clock: Clock, group: Group, device: str) -> Iterator[TimedPoint]:
    grid = [(rows, 1, context) for context in effort.decode_contexts for rows in effort.decode_rows]
    chunk = effort.prefill_row_tokens
    grid += [(rows, chunk, context) for context in effort.prefill_contexts for rows in effort.prefill_rows]
    with Layers(subject, clock, device) as layers:
        room = {context: effort.scratch_bytes // max(1, layers.cache_bytes(context)) for _, _, context in grid}
        grid = [(rows, each, context) for rows, each, context in grid if rows == 1 or rows <= room[context]]
        runs = [layers.run(rows=rows, row_tokens=each, context_tokens=context) for rows, each, context in grid]
        times = group(f"{subject.name}: attention and gate", 0.42, runs)
    gates: set[int] = set()
    for (rows, each, context), (attention, gate) in zip(grid, times, strict=True):
        tokens = rows * each
        yield TimedPoint(
            kind="attention",
            shape=subject.attention_shape,
            tokens=tokens,
            time=attention,
            context_tokens=context,
            row_tokens=each,
        )
        if tokens not in gates:
            gates.add(tokens)
            flops = 2.0 * tokens * subject.hidden * subject.gate_shape.intermediate
            yield TimedPoint(kind="gate", shape=subject.gate_shape, tokens=tokens, time=gate, flops=flops)


def _head_points(subject: Subject, effort: Effort, clock: Clock, group: Group, device: str) -> Iterator[TimedPoint]:
    """The product with the vocabulary's matrix: a part of its rows, at the rate of which the whole is counted."""
    most = effort.scratch_bytes // (4 * subject.hidden * subject.dtype.itemsize)
    rows = max(1, min(subject.vocabulary, HEAD_ROWS, most))
    scale = subject.vocabulary / rows
    weight_VH = torch.rand(rows, subject.hidden, generator=torch.Generator().manual_seed(0)).to(device, subject.dtype)

    def run_of(tokens: int) -> Run:
        hidden_TH = torch.ones(tokens, subject.hidden, dtype=subject.dtype, device=device)

        def run() -> tuple[float, ...]:
            with torch.inference_mode():
                begin = clock()
                torch.nn.functional.linear(hidden_TH, weight_VH)
                return ((clock() - begin) * scale,)

        return run

    times = group(f"{subject.name}: head", 0.1, [run_of(tokens) for tokens in effort.head_tokens])
    for tokens, (time_s,) in zip(effort.head_tokens, times, strict=True):
        flops = 2.0 * tokens * subject.hidden * subject.vocabulary
        yield TimedPoint(kind="dense", shape=subject.dense_shape, tokens=tokens, time=time_s, flops=flops)


def _disk(subjects: Sequence[Subject], clock: Clock, group: Group) -> tuple[Tier, Measurement, list[str]]:
    notes = []
    with ExitStack() as stack:
        sources_LE = subjects[0].sources_LE
        if sources_LE is not None:
            experts: list[list[TensorRef]] = [list(source.parts) for row in sources_LE for source in row]
        else:
            nbytes = subjects[0].expert_flops_per_token // 2 * subjects[0].dtype.itemsize
            experts = stack.enter_context(scratch_experts(nbytes))
            notes.append(f"disk: a scratch file in {tempfile.gettempdir()}, not a model's own file")
        reads = stack.enter_context(ExpertReads(experts, clock))
        ((time_s,),) = group("reads of experts", 0.12, [reads.run])
        if not reads.is_direct:
            notes.append("disk: the file system refuses direct reads; the rate may be that of the page cache")
        capacity = shutil.disk_usage(Path(experts[0][0].file).parent).total
    tier = Tier(name="disk", capacity_bytes=capacity, bytes_per_s=reads.bytes_per_run / time_s.seconds)
    return tier, time_s, notes


def _curves(points: Sequence[TimedPoint]) -> Iterator[Curve]:
    """One curve for all points that share everything but tokens and active experts, in order of their first point."""
    groups: dict[tuple[CurveKind, Shape, int | None, int | None], dict[tuple[int, int], float]] = {}
    for point in points:
        key = (point.kind, point.shape, point.context_tokens, point.row_tokens)
        groups.setdefault(key, {}).setdefault((point.tokens, point.active), point.time.seconds)
    for (kind, shape, context, rows), times in groups.items():
        yield Curve(
            kind=kind,
            shape=shape,
            context_tokens=context,
            row_tokens=rows,
            points=tuple(
                Point(tokens=tokens, active=active, seconds=seconds)
                for (tokens, active), seconds in sorted(times.items(), key=lambda item: (item[0][1], item[0][0]))
            ),
        )


def _notes(points: Sequence[TimedPoint], subjects: Sequence[Subject]) -> Iterator[str]:
    loose = [point for point in points if not point.time.is_certain]
    if loose:
        yield (
            f"{len(loose)} of {len(points)} points are less certain than 5 % either way (95 % interval of the median) "
            "when their time was up; a quieter machine makes them tighter"
        )
    for subject in subjects:
        if subject.sources_LE is not None and any(source.is_quantised for source in subject.sources_LE[0]):
            yield f"{subject.name}: experts are timed as weights; making them from what is quantised runs beside, untimed"


def _share_of(label: str, done: int, groups: int, on_progress: OnProgress) -> Callable[[float], None]:
    return lambda share: on_progress(label, (done + share) / groups)
