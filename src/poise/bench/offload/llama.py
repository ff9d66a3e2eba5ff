"""`poise bench offload-llama`: one sequence, 4 and 16: Poise beside llama.cpp on the same weights in the same memory.

llama.cpp maps a GGUF file of the same bf16 weights and lets the kernel page (decision 019); several sequences are its own
parallel sequences. It runs with the kernel's default read-ahead and with this machine's own. Counted is the time of a decode
step; prompts of 32 tokens, tokens sampled at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import measure_reference_products, work_directory
from poise.bench.offload.contenders import Contenders, llama_model
from poise.bench.offload.report import SETTING, as_json, bubbles, finish, limited, line, memory
from poise.bench.parts import Parts, say
from poise.bench.read_ahead import KERNEL_DEFAULT_KIB

NAME = "offload-llama"
SEQUENCES = (1, 4, 16)
PROMPT_TOKENS, NEW_TOKENS = 32, 32
STEPS = 16
BASELINE_S = 240.0
PARTS = tuple(f"{contender}-{sequences}" for sequences in SEQUENCES for contender in ("poise", "llama"))


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """About ten minutes."""
    directory = work_directory()
    say("Making the reference model and its GGUF file, or finding them")
    llama_model(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with limited(directory) as limits:
        say("Measuring matrix products")
        contenders = Contenders(limits=limits, directory=directory, products=measure_reference_products())
        done.run({part: partial(_measure, contenders, part, steps or STEPS) for part in PARTS})
        results = done.results()
        finish(NAME, limits, {"parts": results}, [_table(results)], output=output, json_output=json_output)
    done.raise_if_failed()


def _measure(contenders: Contenders, part: str, steps: int) -> dict[str, Any]:
    contender, _, count = part.partition("-")
    given = {"sequences": int(count), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "steps": steps}
    if contender == "poise":
        ours = contenders.poise(**given)
        say(line(ours))
        return {"rows": [as_json(ours)]}
    rows, remarks = [], []
    for read_ahead_kib in (KERNEL_DEFAULT_KIB, None):
        theirs = contenders.llama(**given, read_ahead_kib=read_ahead_kib, max_s=BASELINE_S)
        say(line(theirs))
        if isinstance(theirs, str):
            remarks.append(theirs)
        else:
            rows.append(as_json(theirs))
    return {"rows": rows, "remarks": remarks}


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("", title=f"Decode, {PROMPT_TOKENS} tokens of prompt; {SETTING}")
    for column in ("sequences", "steps run", "step s", "tokens/s", "read GB a step", "read-ahead KiB", "Poise over it"):
        table.add_column(column, justify="right")
    table.add_column("peak/limit, added/budget GB", justify="right")
    table.add_column("bubbles a pass")
    rows = [row for result in results.values() for row in result["rows"]]
    ours = {row["sequences"]: row for row in rows if row["name"] == "Poise"}
    for row in rows:
        against = ours.get(row["sequences"])
        is_peer = row["name"] != "Poise" and against is not None
        table.add_row(
            row["name"],
            str(row["sequences"]),
            str(row["new_tokens"] - 1 - row["extrapolated_steps"]),
            f"{row['step_s']:.2f}",
            f"{row['sequences'] / row['step_s']:.2f}",
            f"{row['step_bytes'] / 1e9:.2f}" if row["step_bytes"] is not None else "?",
            str(row["detail"].get("read_ahead_kib", "")),
            f"{row['step_s'] / against['step_s']:.2f}x" if is_peer and against else "",
            memory(row),
            bubbles(row),
        )
    return table
