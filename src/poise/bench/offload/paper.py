"""`poise bench offload`: as the paper counts. Poise with its planned n x bs over Accelerate's disk offload at bs 4, 16, 64.

Metric: generated tokens over prefill and decode (section 6 of the paper), 32 tokens in and 32 out, and 512 in and 32 out
(the parts named "long"). Accelerate's ``max_memory`` is swept, with the kernel's default read-ahead and the machine's own (with
long prompts, the most memory that leaves room for the activations); all are in the result, the best is compared with. Decode
steps that were not run count as the mean of those that were, and every row says how many. The ceiling is the ratio that Poise
would have at its own limit (``bench.offload.bound``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from poise.bench.offload.case import measure_reference_products, reference_model, work_directory
from poise.bench.offload.contenders import Contenders
from poise.bench.offload.report import SETTING, as_json, bubbles, extrapolated, finish, guesses, limited, line, memory
from poise.bench.parts import Parts, say
from poise.bench.read_ahead import KERNEL_DEFAULT_KIB

NAME = "offload"
SEQUENCES = (512, 1024)
LONG_SEQUENCES = (64, 128)
"""With 512 tokens in: keys and values of one sequence take 18 MB."""
BATCH_SIZES = (4, 16, 64)
SHORT, LONG = (32, 32), (512, 32)
SWEEP = (
    (500_000_000, KERNEL_DEFAULT_KIB),
    (900_000_000, KERNEL_DEFAULT_KIB),
    (1_300_000_000, KERNEL_DEFAULT_KIB),
    (1_300_000_000, None),
)
"""Of Accelerate: bytes of weights in memory, and the read-ahead (None: as this machine has it)."""
LONG_SWEEP = tuple((weights_bytes, KERNEL_DEFAULT_KIB) for weights_bytes in (1_300_000_000, 900_000_000, 500_000_000))
"""With long prompts: the first that leaves room for the activations, as with short ones more weights in memory are faster."""
BASELINE_S = 240.0
STEPS = 8
"""Of Accelerate's, unless --steps says otherwise."""
PARTS = (
    *(f"poise-{sequences}" for sequences in SEQUENCES),
    *(f"accelerate-{size}" for size in BATCH_SIZES),
    *(f"long-poise-{sequences}" for sequences in LONG_SEQUENCES),
    *(f"long-accelerate-{size}" for size in BATCH_SIZES),
)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """About two hours in all; each part is 5 to 20 minutes."""
    directory = work_directory()
    say("Making the reference model, or finding it")
    reference_model(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with limited(directory) as limits:
        products = None
        if any("poise" in part for part in parts or PARTS):
            say("Measuring matrix products")
            products = measure_reference_products()
        contenders = Contenders(limits=limits, directory=directory, products=products)
        done.run(_measures(contenders, steps))
        results = done.results()
        tables = [
            _table(results, title=f"{tokens[0]} tokens in, {tokens[1]} out; {SETTING}", is_long=tokens == LONG)
            for tokens in (SHORT, LONG)
        ]
        summary = {"short": ratios(results, is_long=False), "long": ratios(results, is_long=True)}
        finish(NAME, limits, {"parts": results, "ratios": summary}, tables, output=output, json_output=json_output)
    done.raise_if_failed()


def _measures(contenders: Contenders, steps: int | None) -> dict[str, Callable[[], dict[str, Any]]]:
    measures: dict[str, Callable[[], dict[str, Any]]] = {}
    for prefix, tokens, counts in (("", SHORT, SEQUENCES), ("long-", LONG, LONG_SEQUENCES)):
        for sequences in counts:
            measures[f"{prefix}poise-{sequences}"] = partial(_poise, contenders, sequences, tokens, steps)
        for size in BATCH_SIZES:
            measures[f"{prefix}accelerate-{size}"] = partial(_accelerate, contenders, size, tokens, steps or STEPS)
    return measures


def _poise(contenders: Contenders, sequences: int, tokens: tuple[int, int], steps: int | None) -> dict[str, Any]:
    outcome = contenders.poise(sequences=sequences, prompt_tokens=tokens[0], new_tokens=tokens[1], steps=steps)
    say(line(outcome))
    products = None if contenders.products is None else contenders.products.products.as_json()
    return {"rows": [as_json(outcome)], "products": products}


def _accelerate(contenders: Contenders, size: int, tokens: tuple[int, int], steps: int) -> dict[str, Any]:
    rows, remarks = [], []
    is_long = tokens == LONG
    for weights_bytes, read_ahead_kib in LONG_SWEEP if is_long else SWEEP:
        read_ahead = "the machine's read-ahead" if read_ahead_kib is None else f"{read_ahead_kib} KiB read-ahead"
        setting = f"{weights_bytes / 1e9:.1f} GB of weights in memory, {read_ahead}"
        say(f"  {setting}")
        outcome = contenders.accelerate(
            sequences=size,
            prompt_tokens=tokens[0],
            new_tokens=tokens[1],
            steps=steps,
            weights_bytes=weights_bytes,
            read_ahead_kib=read_ahead_kib,
            max_s=BASELINE_S,
        )
        say(line(outcome))
        if isinstance(outcome, str):
            remarks.append(f"{setting}: {outcome}")
        else:
            rows.append(as_json(outcome))
            if is_long:
                break
    return {"rows": rows, "remarks": remarks}


def rows_of(results: Mapping[str, Mapping[str, Any]], contender: str, *, is_long: bool) -> list[dict[str, Any]]:
    """All rows of a contender's parts."""
    prefix = f"{'long-' if is_long else ''}{contender}-"
    return [row for part, result in results.items() if part.startswith(prefix) for row in result["rows"]]


def best_of(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The fastest row for each number of sequences."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["tokens_per_s"]):
        best[row["sequences"]] = row
    return dict(sorted(best.items()))


def ratios(results: Mapping[str, Mapping[str, Any]], *, is_long: bool) -> dict[str, dict[str, float]]:
    """Of each batch size of Accelerate's: Poise's best rate over its best, and what Poise's limit would allow."""
    ours = rows_of(results, "poise", is_long=is_long)
    if not ours:
        return {}
    best = max(ours, key=lambda row: row["tokens_per_s"])
    theirs = best_of(rows_of(results, "accelerate", is_long=is_long))
    return {
        str(size): {
            "ratio": best["tokens_per_s"] / row["tokens_per_s"],
            "ceiling": best["limit_tokens_per_s"] / row["tokens_per_s"],
        }
        for size, row in theirs.items()
    }


def _table(results: Mapping[str, Mapping[str, Any]], *, title: str, is_long: bool) -> Table:
    """Accelerate's best rows only; the result file has all."""
    table = Table("", title=title)
    for column in ("sequences", "tokens/s", "prefill s", "step s", "steps run", "of the limit", "over it", "ceiling"):
        table.add_column(column, justify="right")
    table.add_column("peak/limit, added/budget GB", justify="right")
    table.add_column("read ahead: used, hottest")
    table.add_column("bubbles a pass")
    over = ratios(results, is_long=is_long)
    theirs = best_of(rows_of(results, "accelerate", is_long=is_long)).values()
    for row in (*rows_of(results, "poise", is_long=is_long), *theirs):
        ratio = over.get(str(row["sequences"])) if row["name"] != "Poise" else None
        table.add_row(
            row["name"],
            str(row["sequences"]),
            f"{row['tokens_per_s']:.2f}",
            f"{row['prefill_s']:.1f}",
            f"{row['step_s']:.2f}" if row["step_s"] is not None else "?",
            extrapolated(row),
            f"{row['limit_frac']:.0%}" if "limit_frac" in row else "",
            f"{ratio['ratio']:.1f}x" if ratio else "",
            f"{ratio['ceiling']:.1f}x" if ratio else "",
            memory(row),
            guesses(row),
            bubbles(row),
        )
    return table
