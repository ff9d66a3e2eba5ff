"""Trained lookahead predictors for the widened model, made once by `poise distill`.

The bundled model is taught, which has the same hidden states and routers and computes a 32nd; what it learnt is then written
for the widened one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from poise.bench.parallel.case import Case
from poise.errors import PoiseError
from poise.spec.whole_file import write_whole

KINDS = ("code profile", "prose profile")
"""Of the rows that are learnt from: files that the bundled model was trained on."""
WITHIN_S = 400.0


def distilled(directory: Path, bundled: Case, widened: Case, *, kinds: Sequence[str] = KINDS) -> Path:
    """The file for the widened model. ``kinds``: of rows, to learn from. Raises PoiseError where `poise distill` fails."""
    from poise.model.checkpoint import open_checkpoint
    from poise.model.fingerprint import model_fingerprint
    from poise.model.lookahead import LOOKAHEAD_FORMAT

    only = "" if tuple(kinds) == KINDS else "-".join(["", *kinds]).replace(" ", "-")
    target = directory / f"{widened.model.name}-lookahead{only}.safetensors"
    if target.exists():
        return target
    own, prompts = directory / f"bundled-lookahead{only}.safetensors", directory / f"distill{only}.jsonl"
    rows = [row.tolist() for kind in kinds for row in bundled.rows[kind]]
    write_whole(prompts, "".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows))
    command = [sys.executable, "-m", "poise", "distill", str(bundled.model), "--prompts", str(prompts)]
    run = subprocess.run(
        [*command, "--output", str(own), "--no-control"], capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    if run.returncode:
        raise PoiseError(f"poise distill failed: {run.stderr.strip()[-400:]}")
    tensors, fields = LOOKAHEAD_FORMAT.load(own)
    LOOKAHEAD_FORMAT.save(target, tensors, {**fields, "model": model_fingerprint(open_checkpoint(widened.model))})
    return target
