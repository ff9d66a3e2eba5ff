"""`poise bench offload-alike`: the same number of sequences for Poise and for Accelerate, 1 to 512: time per decode pass.

Says of every batch what share of its limit Poise reaches (``bench.offload.bound``), how much faster than Accelerate it is, and
which ratio the bytes alone would allow: Accelerate's bytes over the fewest, both in a step. Steps are decode passes in which
every sequence gets a token, the first of them left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import Outcome, measure_reference_products, reference_model, work_directory
from poise.bench.offload.contenders import OUT_OF_MEMORY, Contenders, decode_passes
from poise.bench.offload.report import SETTING, as_json, bubbles, finish, guesses, limited, line, memory, shares
from poise.bench.parts import Parts, say
from poise.bench.read_ahead import KERNEL_DEFAULT_KIB

NAME = "offload-alike"
SEQUENCES = (1, 4, 16, 64, 256, 512)
COMPARED = (1, 4, 16, 64)
"""What Accelerate runs too: beyond, it does not fit into the limit, or one step takes minutes."""
PROMPT_TOKENS, NEW_TOKENS = 32, 32
STEPS, FEW_STEPS, BASELINE_STEPS = 31, 12, 8
"""Of Poise: of up to 16 sequences, and of more; of Accelerate. Belady's rule, which knows what comes, needs many to be fair
where memory answers a good part of a step."""
WEIGHTS_BYTES = (1_300_000_000, 900_000_000, 500_000_000)
"""What Accelerate keeps in memory: the first that its activations leave room for; in `poise bench offload` more is faster."""
BASELINE_S = 240.0
PARTS = tuple(f"{sequences}" for sequences in SEQUENCES)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """About half an hour; each part is 2 to 6 minutes."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with limited(directory) as limits:
        say("Measuring matrix products")
        products = measure_reference_products()
        contenders = Contenders(limits=limits, directory=directory, products=products)
        done.run({part: partial(_measure, contenders, int(part), steps) for part in PARTS})
        results = done.results()
        everything = {"parts": results, "products": products.products.as_json()}
        finish(NAME, limits, everything, [_table(results)], output=output, json_output=json_output)
    done.raise_if_failed()


def _measure(contenders: Contenders, sequences: int, steps: int | None) -> dict[str, Any]:
    given = {"sequences": sequences, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    ours = contenders.poise(**given, steps=steps or (STEPS if sequences <= 16 else FEW_STEPS))
    say(line(ours))
    facts = as_json(ours)
    result: dict[str, Any] = {"sequences": sequences, "poise": facts}
    decode = shares(decode_passes(ours.detail["passes"]))
    decode["limit_frac"] = decode["limit_seconds"] / decode["pass_s"]
    decode["tokens_per_s"] = decode["tokens"] / decode["pass_s"]
    result["decode"] = decode
    if sequences in COMPARED:
        theirs = _accelerate(contenders, given, steps or BASELINE_STEPS)
        if isinstance(theirs, str):
            return result | {"remark": theirs}
        assert theirs.step_s is not None, "an outcome of Accelerate's has a decode step"
        result["accelerate"] = as_json(theirs)
        result["ratio"] = decode["tokens_per_s"] * theirs.step_s / sequences
        if theirs.step_bytes is not None and decode["limit_fewest_bytes"]:
            result["ceiling"] = theirs.step_bytes / decode["limit_fewest_bytes"]
    return result


def _accelerate(contenders: Contenders, given: Mapping[str, int], steps: int) -> Outcome | str:
    theirs: Outcome | str = "not run"
    for weights_bytes in WEIGHTS_BYTES:
        theirs = contenders.accelerate(
            **given, steps=steps, weights_bytes=weights_bytes, read_ahead_kib=KERNEL_DEFAULT_KIB, max_s=BASELINE_S
        )
        say(line(theirs))
        if theirs != OUT_OF_MEMORY:
            break
    return theirs


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("sequences", title=f"Decode, like for like; {SETTING}")
    for column in (
        "pass s",
        "tokens/s",
        "limit s",
        "of the limit",
        "pass/limit",
        "limit: disk s",
        "compute s",
        "disk busy s",
    ):
        table.add_column(column, justify="right")
    for column in ("Accelerate s", "ratio", "ceiling", "read / fewest GB", "peak/limit, added/budget GB"):
        table.add_column(column, justify="right")
    table.add_column("read ahead: used, hottest")
    table.add_column("bubbles a pass")
    for result in results.values():
        decode, theirs = result["decode"], result.get("accelerate")
        table.add_row(
            str(result["sequences"]),
            f"{decode['pass_s']:.2f}",
            f"{decode['tokens_per_s']:.2f}",
            f"{decode['limit_seconds']:.2f}",
            f"{decode['limit_frac']:.0%}",
            f"{1 / decode['limit_frac']:.2f}",
            f"{decode['limit_disk_s']:.2f}",
            f"{decode['limit_compute_s']:.2f}",
            f"{decode['disk_busy_s']:.2f}",
            f"{theirs['step_s']:.2f}" if theirs else result.get("remark", "")[:20],
            f"{result['ratio']:.2f}x" if "ratio" in result else "",
            f"{result['ceiling']:.2f}x" if "ceiling" in result else "",
            f"{result['poise']['step_bytes'] / 1e9:.2f}/{decode['limit_fewest_bytes'] / 1e9:.2f}",
            memory(result["poise"]),
            guesses(result["poise"]),
            bubbles(decode),
        )
    return table
