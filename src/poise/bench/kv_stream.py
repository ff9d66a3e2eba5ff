"""What caches on disk cost: bytes that a decode pass moves against what it must, and the share of the disk's rate.

Batches of rows with a long past go through layers of attention in the engine's order, once with nothing computed and once
with attention itself, which also runs with the caches in memory. Rounds of these and of the disk's yardstick
(``bench.direct_read``) alternate, so that all see the same machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from poise.bench.direct_read import ReadPattern, measure_patterns
from poise.bench.disk import scratch_file
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.offload.kv_places import FilePlace
from poise.offload.kv_stream import KvStream
from poise.plan.schedule import schedule_pass
from poise.units import GIB, MIB, format_bytes

NAME = "kv"
LAYERS, BATCHES, ROWS = 6, 4, 16
HEADS, KV_HEADS, HEAD_SIZE = 32, 4, 128
"""Attention of Qwen3-30B-A3B: 2 kB a token and layer in bf16."""
PAST_TOKENS = 512
ROUNDS = 4

Attend = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvRound:
    """One decode pass each way, in seconds, and the yardstick."""

    streamed_s: float
    streamed_and_computed_s: float
    computed_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCost:
    """``needed_bytes``: every past once and every new token once. ``moved_bytes``: what a pass read and wrote."""

    needed_bytes: int
    moved_bytes: int
    slots_bytes: int
    caches_bytes: int
    rounds: tuple[KvRound, ...]

    @property
    def disk_frac(self) -> float:
        """Median share of the disk's rate, pair by pair, with nothing computed."""
        return statistics.median(self.moved_bytes / each.streamed_s / each.disk_bytes_per_s for each in self.rounds)

    @property
    def longer_frac(self) -> float:
        """Attention over caches on disk against the longer of moving them and attention in memory, the median."""
        return statistics.median(
            each.streamed_and_computed_s / max(each.streamed_s, each.computed_s) for each in self.rounds
        )


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench kv`: on the disk that holds ``output``, or else the directory for temporary files."""
    cost = measure(Path(tempfile.gettempdir()) if output is None else output, rounds=ROUNDS)
    facts = stamp()
    results: dict[str, object] = {
        "layers": LAYERS,
        "batches": BATCHES,
        "rows": ROWS,
        "past_tokens": PAST_TOKENS,
        "moved_per_needed": cost.moved_bytes / cost.needed_bytes,
        "disk_frac": cost.disk_frac,
        "longer_frac": cost.longer_frac,
        **asdict(cost),
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        _print_table(cost)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


@torch.inference_mode()
def measure(directory: Path, *, rounds: int) -> KvCost:
    """Decode passes over caches on disk and in memory, in alternating rounds."""
    final_tokens = PAST_TOKENS + 2 * rounds + 1
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace()))
    stream = KvStream(FilePlace(directory))
    on_disk, in_memory = ([DynamicCache() for _ in range(BATCHES)] for _ in range(2))
    try:
        for cache in (*on_disk, *in_memory):
            cache.layers = [DynamicLayer() for _ in range(LAYERS)]
        for cache in on_disk:
            stream.adopt(model, cache, rows=ROWS, final_tokens=final_tokens)
        for each, caches in ((stream, on_disk), (None, in_memory)):
            _pass(each, caches, PAST_TOKENS, lambda keys, values: None)
        made: list[KvRound] = []
        counters = stream.counters
        with scratch_file(directory, GIB) as path:
            patterns = [ReadPattern(order="sequential", block_bytes=16 * MIB, threads=n, buffers=2) for n in (1, 2)]
            for number in track(range(rounds), "Decoding", console=Console(stderr=True), transient=True):
                before = counters.bytes_read + counters.bytes_written
                streamed_s = _pass(stream, on_disk, 1, lambda keys, values: None)
                moved = counters.bytes_read + counters.bytes_written - before
                both = measure_patterns(path, patterns, rounds=1, round_s=0.3, seed=number)
                made.append(
                    KvRound(
                        streamed_s=streamed_s,
                        streamed_and_computed_s=_pass(stream, on_disk, 1, _attend),
                        computed_s=_pass(None, in_memory, 1, _attend),
                        disk_bytes_per_s=max(rate.median_bytes_per_s for rate in both),
                    )
                )
    finally:
        stream.close()
    token_bytes = 2 * KV_HEADS * HEAD_SIZE * 2 * ROWS
    share_bytes = (PAST_TOKENS + 2 * rounds - 1) * token_bytes
    return KvCost(
        needed_bytes=LAYERS * BATCHES * share_bytes,
        moved_bytes=moved,
        slots_bytes=2 * final_tokens * token_bytes,
        caches_bytes=LAYERS * BATCHES * share_bytes,
        rounds=tuple(made),
    )


def _pass(stream: KvStream | None, caches: Sequence[Any], tokens: int, attend: Attend) -> float:
    """Seconds of one pass over the layers, batch by batch; new keys and values are made before."""
    keys_BHTD = torch.zeros(ROWS, KV_HEADS, tokens, HEAD_SIZE, dtype=torch.bfloat16)
    began = time.perf_counter()
    if stream is not None:
        stream.begin_pass(caches)
    for step in schedule_pass(num_layers=LAYERS - 1, num_batches=len(caches), kv_on_disk=stream is not None).steps:
        if step.kind == "kv" and stream is not None:
            stream.expect(step.layer, step.batch or 0)
        elif step.kind == "attention":
            if stream is not None:
                stream.attend(step.layer)
            attend(*caches[step.batch or 0].update(keys_BHTD, keys_BHTD, step.layer))
    return time.perf_counter() - began


def _attend(keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor) -> None:
    """One query per head; those that share keys side by side, as transformers packs them where rows are padded."""
    query_BHTD = torch.zeros(ROWS, KV_HEADS, HEADS // KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    torch.nn.functional.scaled_dot_product_attention(query_BHTD, keys_BHTD, values_BHTD)


def _print_table(cost: KvCost) -> None:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    table = Table(title=f"A decode pass of {BATCHES} batches of {ROWS} rows of {PAST_TOKENS} tokens, {LAYERS} layers")
    for column in ("", "value"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in (
        ("caches", format_bytes(cost.caches_bytes)),
        ("of that in memory", format_bytes(cost.slots_bytes)),
        ("moved per byte that must be", f"{cost.moved_bytes / cost.needed_bytes:.4f}"),
        ("share of the disk's rate, nothing computed", f"{cost.disk_frac:.0%}"),
        ("streamed, nothing computed", f"{median([each.streamed_s for each in cost.rounds]):.2f} s"),
        ("attention, caches in memory", f"{median([each.computed_s for each in cost.rounds]):.2f} s"),
        ("attention, caches on disk", f"{median([each.streamed_and_computed_s for each in cost.rounds]):.2f} s"),
        ("of the longer of the two", f"{cost.longer_frac:.0%}"),
    ):
        table.add_row(name, value)
    Console().print(table)
