"""`poise bench offload-alike`: the same number of sequences for Poise and for Accelerate, 1 to 512: time per decode pass.

Says of every batch what share of its own limit Poise reaches, how much faster than Accelerate it is, and which ratio the
bytes alone would allow (Accelerate's bytes over the fewest).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import (
    READ_BYTES_PER_S,
    Outcome,
    reference_model,
    run_accelerate,
    run_poise,
    work_directory,
)
from poise.bench.offload.report import finish, limited, say

NAME = "offload-alike"
SEQUENCES = (1, 4, 16, 64, 256, 512)
COMPARED = (1, 4, 16, 64)
"""What Accelerate runs too: beyond, it does not fit into the limit, or one step takes minutes."""
PROMPT_TOKENS = 32
DECODE_PASSES = 6
WEIGHTS_BYTES = 1_300_000_000
BASELINE_S = 75.0


def run(output: Path | None, json_output: bool) -> None:
    """About half an hour."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    rows: list[dict[str, Any]] = []
    with limited(directory) as limits:
        for sequences in SEQUENCES:
            say(f"{sequences} sequences")
            ours = run_poise(
                limits,
                directory,
                sequences=sequences,
                prompt_tokens=PROMPT_TOKENS,
                new_tokens=DECODE_PASSES + 8,
                passes=DECODE_PASSES + 2 + -(-sequences // 64),
            )
            theirs: Outcome | str | None = None
            if sequences in COMPARED:
                theirs = run_accelerate(
                    limits,
                    directory,
                    sequences=sequences,
                    prompt_tokens=PROMPT_TOKENS,
                    new_tokens=DECODE_PASSES + 1,
                    weights_bytes=WEIGHTS_BYTES,
                    max_s=BASELINE_S,
                )
            rows.append(_row(sequences, ours, theirs))
            say(f"  {rows[-1]}")
        finish(NAME, limits, {"cases": rows}, [_table(rows)], output=output, json_output=json_output)


def _row(sequences: int, ours: Outcome, theirs: Outcome | str | None) -> dict[str, Any]:
    plan = ours.detail["plan"]
    decode = [each for each in ours.detail["passes"] if each["tokens"] == sequences][-DECODE_PASSES:]
    limits_s = [
        max(
            max(0, each["hits"] + each["misses"] - plan["expert_slots"]) * plan["expert_bytes"] / READ_BYTES_PER_S,
            each["computing_s"],
        )
        for each in decode
    ]
    pass_s = statistics.median(each["seconds"] for each in decode)
    row: dict[str, Any] = {
        "sequences": sequences,
        "pass_s": pass_s,
        "tokens_per_s": sequences / pass_s,
        "limit_frac": statistics.median(limit / each["seconds"] for limit, each in zip(limits_s, decode, strict=True)),
        "bytes_per_pass": statistics.median(each["bytes"] for each in decode),
        "bubbles_s": decode[-1]["bubbles_s"],
        "peak_bytes": ours.peak_bytes,
        "predicted_tokens_per_s": plan["predicted_tokens_per_s"],
    }
    if isinstance(theirs, Outcome):
        step_s = theirs.detail["step_s"]
        row |= {"accelerate_step_s": step_s, "ratio": step_s / pass_s, "accelerate_read_bytes": theirs.read_bytes}
    elif theirs is not None:
        row["remark"] = theirs
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("sequences", title="Decode, like for like; 2.5 GB of memory, 1 GB/s of disk")
    for column in ("pass s", "tokens/s", "share of the limit", "read GB", "Accelerate s", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["sequences"]),
            f"{row['pass_s']:.2f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['limit_frac']:.0%}",
            f"{row['bytes_per_pass'] / 1e9:.2f}",
            f"{row['accelerate_step_s']:.1f}" if "accelerate_step_s" in row else row.get("remark", "")[:20],
            f"{row['ratio']:.2f}x" if "ratio" in row else "",
        )
    return table
