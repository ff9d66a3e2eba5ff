"""`poise distill` on the bundled model, run as a user runs it: all its figures per layer, an untrained model among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from poise.bench.corpus import load_corpus
from poise.bench.routed_text import MODEL
from poise.errors import PoiseError

DOCUMENTS = 60
"""Of each domain, half code, half prose."""
DOCUMENT_TOKENS = 4096
"""The beginning of each, so that no document is half of the text."""
MEMORY = "1GiB"


def measure() -> dict[str, Any]:
    """What `poise distill --json` prints, without the model's path."""
    with tempfile.TemporaryDirectory(prefix="poise-distill-") as scratch:
        text, output = Path(scratch) / "text.jsonl", Path(scratch) / "lookahead.safetensors"
        write_text(text)
        argv = [sys.executable, "-m", "poise", "distill", str(MODEL), "--prompts", str(text), "--output", str(output)]
        run = subprocess.run(
            [*argv, "--memory", MEMORY, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if run.returncode != 0:
            raise PoiseError(f"poise distill ended with {run.returncode}")
        summary: dict[str, Any] = json.loads(run.stdout)
        del summary["model"]
        return summary | {"file_bytes": output.stat().st_size}


def write_text(path: Path) -> None:
    """Documents that the bundled model was trained on, as token ids, a line each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = []
    for domain in load_corpus():
        order = np.random.default_rng(0).permutation(len(domain.train))[:DOCUMENTS]
        for place in order:
            ids = tokenizer(domain.train[place], verbose=False)["input_ids"][:DOCUMENT_TOKENS]
            lines.append(json.dumps({"prompt_token_ids": ids}))
    path.write_text("\n".join(lines) + "\n")
