"""`poise bench offload`: as the paper counts. Poise with its planned n x bs over Accelerate's disk offload at bs 4, 16, 64.

Metric: generated tokens over prefill and decode. Accelerate's ``max_memory`` is swept and the best kept; a run that takes
long is stopped, and the steps that are missing are counted as its mean step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import Outcome, reference_model, run_accelerate, run_poise, work_directory
from poise.bench.offload.report import as_json, finish, limit_s, limited, say

NAME = "offload"
SEQUENCES = (512, 1024)
BATCH_SIZES = (4, 16, 64)
PROMPT_TOKENS, NEW_TOKENS = 32, 32
WEIGHTS_BYTES = (900_000_000, 1_300_000_000)
BASELINE_S = 75.0


def run(output: Path | None, json_output: bool) -> None:
    """About an hour."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    results: dict[str, Any] = {"poise": [], "accelerate": [], "remarks": []}
    with limited(directory) as limits:
        ours = []
        for sequences in SEQUENCES:
            say(f"Poise, {sequences} sequences")
            ours.append(
                run_poise(limits, directory, sequences=sequences, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
            )
            say(_line(ours[-1]))
        theirs = []
        for batch_size in BATCH_SIZES:
            best: Outcome | None = None
            for weights_bytes in WEIGHTS_BYTES:
                say(f"Accelerate, batch size {batch_size}, {weights_bytes / 1e9:.1f} GB of weights in memory")
                outcome = run_accelerate(
                    limits,
                    directory,
                    sequences=batch_size,
                    prompt_tokens=PROMPT_TOKENS,
                    new_tokens=NEW_TOKENS,
                    weights_bytes=weights_bytes,
                    max_s=BASELINE_S,
                )
                if isinstance(outcome, str):
                    results["remarks"].append(f"Accelerate bs {batch_size}, {weights_bytes}: {outcome}")
                    say(outcome)
                    continue
                say(_line(outcome))
                results["accelerate"].append(as_json(outcome))
                if best is None or outcome.tokens_per_s > best.tokens_per_s:
                    best = outcome
            if best is not None:
                theirs.append(best)
        best_of_ours = max(ours, key=lambda outcome: outcome.tokens_per_s)
        results["poise"] = [{**as_json(outcome), "limit_s": limit_s(outcome)} for outcome in ours]
        results["ratios"] = {
            str(outcome.sequences): best_of_ours.tokens_per_s / outcome.tokens_per_s for outcome in theirs
        }
        finish(NAME, limits, results, [_table(ours, theirs)], output=output, json_output=json_output)


def _line(outcome: Outcome) -> str:
    return f"  {outcome.name}: {outcome.tokens_per_s:.2f} tokens/s, prefill {outcome.prefill_s or 0:.0f} s"


def _table(ours: list[Outcome], theirs: list[Outcome]) -> Table:
    table = Table(
        "", title=f"{PROMPT_TOKENS} tokens in, {NEW_TOKENS} out; 2.5 GB of memory, 1 GB/s of disk, 10 GB of model"
    )
    for column in ("sequences", "tokens/s", "share of the limit", "Poise's best over it"):
        table.add_column(column, justify="right")
    best = max(outcome.tokens_per_s for outcome in ours)
    for outcome in (*ours, *theirs):
        share = f"{limit_s(outcome) / outcome.total_s:.0%}" if outcome.name == "Poise" else ""
        table.add_row(
            outcome.name,
            str(outcome.sequences),
            f"{outcome.tokens_per_s:.2f}",
            share,
            f"{best / outcome.tokens_per_s:.1f}x" if outcome.name != "Poise" else "",
        )
    return table
