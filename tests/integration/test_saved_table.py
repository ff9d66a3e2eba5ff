"""A correlation table that outlives its run: written by `poise generate`, also after an interruption, and begun from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import poise
from poise import LLM, SamplingParams
from poise.engine.request import Progress
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.predict.correlation import CorrelationTable
from tests.conftest import MakeCheckpoint

MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "poise", "generate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)


def test_generate_writes_a_table_and_begins_from_it(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    saved, again = tmp_path / "table", tmp_path / "again"
    common = (MODEL, "def main():", "--max-tokens", "8", "--memory", "1GiB", "--json")
    first = run(*common, "--save-table", saved)
    assert first.returncode == 0, first.stderr
    assert f"correlation table in {saved}" in first.stderr
    assert CorrelationTable.load(saved, model=model_fingerprint(open_checkpoint(MODEL))).num_tokens > 8
    second = run(*common, "--correlation-table", saved, "--save-table", again)
    assert second.returncode == 0, second.stderr
    assert json.loads(first.stdout)["results"] == json.loads(second.stdout)["results"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "table"]
    other = run(checkpoint("qwen3_moe"), "x", "--correlation-table", saved)
    assert other.returncode == 2
    assert "is of model" in other.stderr


def test_an_interrupted_run_has_learnt_and_one_without_a_pass_writes_nothing(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.generated_tokens >= 3:
            raise KeyboardInterrupt

    with LLM(MODEL, memory="1GiB", expert_slots=40) as llm:
        assert not llm.save_table(tmp_path / "none")
        with pytest.raises(KeyboardInterrupt):
            llm.generate("def main():", PARAMS, on_progress=stop)
        assert llm.save_table(tmp_path / "table")
        whole = llm.generate("def main():", PARAMS)[0].outputs[0].token_ids
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]
    with LLM(MODEL, memory="1GiB", expert_slots=40, correlation_table=tmp_path / "table") as llm:
        assert llm.generate("def main():", PARAMS)[0].outputs[0].token_ids == whole
