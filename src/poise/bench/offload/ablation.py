"""`poise bench offload-ablation`: the paper's ablation (table 3), as options of one executor: decode passes of one model.

Whole-layer prefetch with one batch; several batches; only hot experts; experts in order of arrival; Poise's own read-ahead;
4 bits. A rate is rows over the median decode pass, so that prefill, which is alike for all, does not blur it.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import CONFIG, Outcome, reference_model, run_poise, work_directory
from poise.bench.offload.report import finish, limited, say

NAME = "offload-ablation"
BATCH_SIZE, NUM_BATCHES = 16, 16
PROMPT_TOKENS = 8
DECODE_PASSES = 5
HOT = CONFIG["num_experts_per_tok"]
VARIANTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("whole-layer prefetch, one batch", 1, {"read_ahead": "layer", "order": "index"}),
    ("+ several batches", NUM_BATCHES, {"read_ahead": "layer", "order": "index"}),
    ("+ only hot experts", NUM_BATCHES, {"read_ahead": "hot", "order": "index", "ahead": HOT}),
    ("+ order of arrival (Klotski)", NUM_BATCHES, {"read_ahead": "hot", "order": "arrival", "ahead": HOT}),
    ("Poise's read-ahead", NUM_BATCHES, {"read_ahead": "likely", "order": "arrival"}),
    ("+ 4 bits", NUM_BATCHES, {"read_ahead": "likely", "order": "arrival", "quantize": "int4"}),
)


def run(output: Path | None, json_output: bool) -> None:
    """About fifteen minutes, of which the 4-bit copy takes a third the first time."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    rows: list[dict[str, Any]] = []
    with limited(directory) as limits:
        for name, num_batches, options in VARIANTS:
            say(name)
            outcome = run_poise(
                limits,
                directory,
                sequences=BATCH_SIZE * num_batches,
                prompt_tokens=PROMPT_TOKENS,
                new_tokens=DECODE_PASSES + 3,
                groups=[[BATCH_SIZE, num_batches]],
                kv_on_disk=False,
                passes=DECODE_PASSES + 2,
                **options,
            )
            rows.append(_row(name, outcome))
            say(f"  {rows[-1]['tokens_per_s']:.2f} tokens/s")
        finish(NAME, limits, {"variants": rows}, [_table(rows)], output=output, json_output=json_output)


def _row(name: str, outcome: Outcome) -> dict[str, Any]:
    """Decode passes only: those in which every row gets a token, the first of them left out."""
    decode = [each for each in outcome.detail["passes"] if each["tokens"] == outcome.sequences][1:]
    seconds = statistics.median(each["seconds"] for each in decode)
    return {
        "name": name,
        "sequences": outcome.sequences,
        "tokens_per_s": outcome.sequences / seconds,
        "pass_s": [each["seconds"] for each in decode],
        "bytes_per_pass": statistics.median(each["bytes"] for each in decode),
        "computing_s": statistics.median(each["computing_s"] for each in decode),
        "disk_busy_s": statistics.median(each["disk_busy_s"] for each in decode),
        "bubbles_s": decode[-1]["bubbles_s"],
        "peak_bytes": outcome.peak_bytes,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", title=f"Decode of {BATCH_SIZE} sequences a batch; 2.5 GB of memory, 1 GB/s of disk")
    for column in ("sequences", "tokens/s", "pass s", "read GB", "computing s", "disk busy s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["sequences"]),
            f"{row['tokens_per_s']:.2f}",
            f"{statistics.median(row['pass_s']):.2f}",
            f"{row['bytes_per_pass'] / 1e9:.2f}",
            f"{row['computing_s']:.2f}",
            f"{row['disk_busy_s']:.2f}",
        )
    return table
