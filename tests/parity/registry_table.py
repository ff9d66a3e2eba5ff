"""``docs/models.md``: what becomes of every class of transformers' registry.

``python -m tests.parity.registry_table`` runs every class and writes it; ``test_registry`` asserts that it is up to date.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from poise.model.cache import needs_equal_rows, needs_whole_prompts
from poise.model.checkpoint import open_checkpoint
from poise.model.inspect import build_meta_model, load_config
from poise.model.wrapped_experts import WRAPPERS
from tests.parity.registry_configs import class_name, model_types
from tests.parity.registry_runs import Outcome, errors, sure_tokens, try_class

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 1e-5
_RESULTS = ("exact", "inexact", "refused", "not run by transformers")


def result(outcome: Outcome) -> str:
    """Exact or not, for a class that ran; else what kept it from running."""
    if outcome.kind != "runs":
        return outcome.kind
    pairs = zip(outcome.ours, outcome.plain, strict=True)
    same = all(run.new_ids[: len(sure_tokens(want))] == sure_tokens(want) for run, want in pairs)
    return "exact" if same and max(errors(outcome.ours, outcome.plain)) <= TOLERANCE else "inexact"


def line(outcome: Outcome, path: Path) -> str:
    """The outcome's line of the table. ``path``: its checkpoint."""
    cells = [f"`{outcome.model_type}`", f"`{class_name(outcome.model_type)}`", result(outcome)]
    return "| " + " | ".join([*cells, *(_how(path) if outcome.kind == "runs" else ("-", "-"))]) + " |"


def _how(path: Path) -> tuple[str, str]:
    """How the experts reach Poise, and what batches the class allows."""
    model = build_meta_model(load_config(open_checkpoint(path)), torch.float32)
    wrapped = any(type(module).__name__ in WRAPPERS for module in model.modules())
    rules = {"rows of equal length": needs_equal_rows(model), "whole prompts": needs_whole_prompts(model)}
    return "wrapper" if wrapped else "registry", ", ".join(rule for rule, holds in rules.items() if holds) or "any"


def remark(outcome: Outcome) -> str:
    """Why a class does not run."""
    return f"- `{outcome.model_type}`: {outcome.line}"


def document(lines: Sequence[str], remarks: Sequence[str]) -> str:
    """The whole of ``docs/models.md``."""
    cells = [[cell.strip() for cell in each.strip("|").split("|")] for each in lines]
    types, classes = (
        {name: sum(row[2] == name for row in cells) for name in _RESULTS},
        {name: len({row[1] for row in cells if row[2] == name}) for name in _RESULTS},
    )
    counts = ", ".join(f"{types[name]} {name} ({classes[name]} classes)" for name in _RESULTS if types[name])
    return "\n".join(
        [
            "# Models",
            "",
            f"Made by `python -m tests.parity.registry_table` with transformers {transformers.__version__};",
            "`tests/parity/test_registry.py` checks every line.",
            "",
            "The mixture-of-experts model types that transformers' registry of causal language models names: "
            f"{len(lines)} ({len({row[1] for row in cells})} classes).",
            f"Of these: **{counts}**.",
            _LEGEND,
            "| model type | class | result | experts | batches |",
            "|---|---|---|---|---|",
            *lines,
            "",
            *(remarks or ["Every class runs."]),
            "",
        ]
    )


_LEGEND = """
*Exact*: from a tiny random checkpoint, as transformers saves it (composite models whole, with their towers), with slots for
3 of 8 to 32 experts, prompts of different length in batches and in chunks, rows ending at different times. In fp32 every
logit, in prefill and in decoding, is within 1e-5 (of the largest) of plain transformers' `generate` on each prompt alone, and
every greedy token that led by more than 1e-4 is the same.

*Experts*: through transformers' registry of experts functions, or through a wrapper of Poise's (`model/wrapped_experts.py`).

*Batches*: what may run together. `any`: rows padded to one length, prompts cut into chunks. Where plain transformers itself is
not exact under padding or in chunks, Poise batches rows of equal length only, or keeps prompts whole (`model/cache.py`).
"""


def main() -> None:
    """Runs every class and writes the document."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines, remarks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model_type in model_types():
            path = Path(folder) / model_type
            outcome = try_class(model_type, path)
            lines.append(line(outcome, path))
            remarks += [remark(outcome)] if outcome.line else []
            print(
                lines[-1], *(f"{max(errors(outcome.ours, outcome.plain)):.1e}" for _ in outcome.plain[:1]), flush=True
            )
    DOCUMENT.write_text(document(lines, remarks))


if __name__ == "__main__":
    main()
