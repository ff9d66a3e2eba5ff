"""`poise bench offload-ablation`: the paper's ablation (table 3), as options of one executor: decode passes of one model.

Whole-layer prefetch with one batch; several batches; only hot experts; experts in order of arrival; what Poise does of
itself; 4 bits. A rate is rows over the mean decode pass, so that prefill, which is alike for all, does not blur it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import CONFIG, reference_model, work_directory
from poise.bench.offload.contenders import Contenders, decode_passes
from poise.bench.offload.report import SETTING, as_json, bubbles, finish, guesses, limited, memory, shares
from poise.bench.parts import Parts, say

NAME = "offload-ablation"
BATCH_SIZE, NUM_BATCHES = 16, 16
PROMPT_TOKENS, NEW_TOKENS = 8, 16
STEPS = 5
HOT = CONFIG["num_experts_per_tok"]
VARIANTS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "layer": ("whole-layer prefetch, one batch", 1, {"read_ahead": "layer", "order": "index"}),
    "batches": ("+ several batches", NUM_BATCHES, {"read_ahead": "layer", "order": "index"}),
    "hot": ("+ only hot experts", NUM_BATCHES, {"read_ahead": "hot", "order": "index", "ahead": HOT}),
    "arrival": ("+ order of arrival (Klotski)", NUM_BATCHES, {"read_ahead": "hot", "order": "arrival", "ahead": HOT}),
    "poise": ("Poise's read-ahead", NUM_BATCHES, {}),
    "int4": ("+ 4 bits", NUM_BATCHES, {"quantize": "int4"}),
}
PARTS = tuple(VARIANTS)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """About fifteen minutes, of which the 4-bit copy takes a third the first time."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with limited(directory) as limits:
        contenders = Contenders(limits=limits, directory=directory)
        done.run({part: partial(_measure, contenders, part, steps or STEPS) for part in PARTS})
        results = done.results()
        finish(NAME, limits, {"parts": results}, [_table(results)], output=output, json_output=json_output)
    done.raise_if_failed()


def _measure(contenders: Contenders, part: str, steps: int) -> dict[str, Any]:
    name, num_batches, options = VARIANTS[part]
    outcome = contenders.poise(
        sequences=BATCH_SIZE * num_batches,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        steps=steps,
        groups=[[BATCH_SIZE, num_batches]],
        kv_on_disk=False,
        **options,
    )
    decode = shares(decode_passes(outcome.detail["passes"]))
    decode["tokens_per_s"] = decode["tokens"] / decode["pass_s"]
    say(f"  {name}: {decode['tokens_per_s']:.2f} tokens/s")
    return {"name": name, "decode": decode, "poise": as_json(outcome)}


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("", title=f"Decode of {BATCH_SIZE} sequences a batch; {SETTING}")
    for column in ("sequences", "tokens/s", "pass s", "read GB", "computing s", "disk busy s"):
        table.add_column(column, justify="right")
    table.add_column("peak/limit, added/budget GB", justify="right")
    table.add_column("read ahead: used, hottest")
    table.add_column("bubbles a pass")
    for result in results.values():
        decode, outcome = result["decode"], result["poise"]
        table.add_row(
            result["name"],
            str(outcome["sequences"]),
            f"{decode['tokens_per_s']:.2f}",
            f"{decode['pass_s']:.2f}",
            f"{outcome['step_bytes'] / 1e9:.2f}",
            f"{decode['computing_s']:.2f}",
            f"{decode['disk_busy_s']:.2f}",
            memory(outcome),
            guesses(outcome),
            bubbles(decode),
        )
    return table
