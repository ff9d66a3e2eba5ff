"""How close the engine's own reads come to the disk's rate: experts through the store, beside an independent reader.

Experts of several sizes lie one after the other in a scratch file, three matrices each, as safetensors would lay them
out, and not aligned to anything. The store scans them with a handful of slots and nothing computes. Rounds of the store
and of the yardstick (``bench.direct_read``) alternate, so that both see the same machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from poise.bench.direct_read import ReadPattern, measure_patterns
from poise.bench.disk import scratch_file
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.model.checkpoint import TensorRef
from poise.model.layout import ExpertSource, ParamRecipe
from poise.model.weights import slot_bytes_for
from poise.offload.expert_store import ExpertStore
from poise.offload.loader import open_disk_store
from poise.units import GIB, KIB, MIB, format_bytes

NAME = "reader"
EXPERT_BYTES = (64 * KIB, 256 * KIB, MIB, 3 * MIB, 9 * MIB, 16 * MIB)
SLOTS = 16
READER_THREADS = 2
ROUNDS = 5
ROUND_BYTES = 512 * MIB
FIRST_BYTE = 8 + 1096
"""Where the first tensor begins: behind a header, at no round offset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderRate:
    """Rates of one expert size, round by round, in bytes per second."""

    expert_bytes: int
    store_bytes_per_s: tuple[float, ...]
    disk_bytes_per_s: tuple[float, ...]

    @property
    def disk_frac(self) -> float:
        """Median share of the disk's rate, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.store_bytes_per_s, self.disk_bytes_per_s, strict=True))


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench reader`: on the disk that holds ``output``, or else the directory for temporary files."""
    directory = Path(tempfile.gettempdir()) if output is None else output
    with scratch_file(directory, GIB) as path:
        sizes = track(EXPERT_BYTES, "Reading experts", console=Console(stderr=True), transient=True)
        rates = [measure(path, size, rounds=ROUNDS, round_bytes=ROUND_BYTES) for size in sizes]
    facts = stamp()
    results: dict[str, object] = {
        "slots": SLOTS,
        "reader_threads": READER_THREADS,
        "sizes": [
            {
                "expert_bytes": rate.expert_bytes,
                "disk_frac": rate.disk_frac,
                "store_bytes_per_s": list(rate.store_bytes_per_s),
                "disk_bytes_per_s": list(rate.disk_bytes_per_s),
            }
            for rate in rates
        ],
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        _print_table(rates)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def measure(path: Path, expert_bytes: int, *, rounds: int, round_bytes: int) -> ReaderRate:
    """The store's and the yardstick's rates for experts of one size, in alternating rounds.

    The yardstick is the better of one and two threads with blocks of an expert's size, in order, into as much memory as
    the store has.
    """
    sources_LE = _lay_out(path, expert_bytes, min(round_bytes, path.stat().st_size - FIRST_BYTE))
    slot_bytes = slot_bytes_for(sources_LE)
    store = open_disk_store(
        sources_LE,
        num_slots=SLOTS,
        slot_bytes=slot_bytes,
        capacity=SLOTS,
        reader_threads=READER_THREADS,
        convert=lambda source, raw: {},
    )
    block = -(-expert_bytes // 4096) * 4096
    patterns = [
        ReadPattern(order="sequential", block_bytes=block, threads=threads, buffers=SLOTS // threads)
        for threads in (1, 2)
    ]
    ours: list[float] = []
    disk: list[float] = []
    try:
        _scan(store, sources_LE)
        for number in range(rounds):
            ours.append(_scan(store, sources_LE))
            both = measure_patterns(path, patterns, rounds=1, round_s=0.3, seed=number)
            disk.append(max(rate.median_bytes_per_s for rate in both))
    finally:
        store.close()
    return ReaderRate(expert_bytes=expert_bytes, store_bytes_per_s=tuple(ours), disk_bytes_per_s=tuple(disk))


def _lay_out(path: Path, expert_bytes: int, total_bytes: int) -> list[list[ExpertSource]]:
    """Two layers of experts of three equal matrices over the scratch file."""
    rows = expert_bytes // 3 // 2
    count = min(total_bytes // expert_bytes, 4096) // 2
    layers = []
    for layer in range(2):
        row = []
        for expert in range(count):
            begin = FIRST_BYTE + (layer * count + expert) * expert_bytes
            parts = [
                TensorRef(
                    name=name, file=path, dtype="BF16", shape=(rows,), offset=begin + place * 2 * rows, nbytes=2 * rows
                )
                for place, name in enumerate(("down", "gate", "up"))
            ]
            recipes = (
                ParamRecipe(param="down_proj", parts=(parts[0],)),
                ParamRecipe(param="gate_up_proj", parts=tuple(parts[1:])),
            )
            shapes = {"down_proj": (rows,), "gate_up_proj": (2 * rows,)}
            row.append(
                ExpertSource(
                    module="scratch", layer=layer, expert=expert, recipes=recipes, shapes=shapes, dtype=torch.bfloat16
                )
            )
        layers.append(row)
    return layers


def _scan(store: ExpertStore, sources_LE: Sequence[Sequence[ExpertSource]]) -> float:
    """Bytes per second of reading every expert once, layer by layer."""
    read_before = store.counters.bytes_read
    began = time.perf_counter()
    for layer, row in enumerate(sources_LE):
        store.request(layer, range(len(row)))
        for _ in row:
            expert, _ = store.take()
            store.release(expert)
    return (store.counters.bytes_read - read_before) / (time.perf_counter() - began)


def _print_table(rates: Sequence[ReaderRate]) -> None:
    table = Table("expert", title=f"Experts through the store, {SLOTS} slots, {READER_THREADS} reader threads")
    for column in ("store GB/s", "disk GB/s", "share of the disk"):
        table.add_column(column, justify="right")
    for rate in rates:
        ours, disk = statistics.median(rate.store_bytes_per_s), statistics.median(rate.disk_bytes_per_s)
        table.add_row(
            format_bytes(rate.expert_bytes), f"{ours / 1e9:.2f}", f"{disk / 1e9:.2f}", f"{rate.disk_frac:.0%}"
        )
    Console().print(table)
