"""`poise distill` as a user runs it, on the bundled model: a file that predicts, figures, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import poise
from poise import LLM
from poise.engine.lookahead_use import LookaheadUse
from poise.errors import TraceError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
BUDGET = "500MiB"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "poise", "distill", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules of the standard library, one a line."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    folder = Path(os.__file__).parent
    names = ("argparse", "calendar", "csv", "heapq", "random", "textwrap", "uuid")
    path.write_text("".join(json.dumps({"prompt": (folder / f"{name}.py").read_text()}) + "\n" for name in names))
    return path


def test_predictors_are_learnt_examined_and_written(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    result = run(MODEL, "--prompts", text, "--output", file, "--memory", BUDGET, "--width", "32", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert [row["layer"] for row in summary["layers"]] == [1, 2, 3, 4, 5]
    assert summary["learnt_tokens"] > summary["held_out_tokens"] > 4096
    mean = summary["mean"]
    assert mean["recall"]["distilled"] > mean["recall"]["frozen"] + 0.03
    assert mean["recall"]["frozen"] > mean["recall"]["correlation"] > mean["recall"]["frequency"]
    assert 0.125 < mean["recall"]["untrained"] < mean["recall"]["distilled"]
    assert mean["misplaced_frac"]["distilled"] < mean["misplaced_frac"]["frozen"]
    assert 1.0 <= mean["left"]["distilled"] < mean["left"]["frequency"]
    for row in summary["layers"]:
        assert row["imbalance"] > row["balanced"] >= 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]
    with LLM(MODEL, memory=BUDGET, lookahead=LookaheadUse(file=file)) as llm:
        assert llm.lookahead is not None
        assert llm.lookahead.learning_layers == (1, 2, 3, 4, 5)
        assert all(llm.lookahead.residual(layer).outer_EW.any() for layer in (1, 5))


@pytest.mark.slow
def test_without_json_tables_are_printed_and_the_file_is_refused_for_another_model(text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(text.read_text().splitlines()[-3:]) + "\n")
    file = tmp_path / "p.safetensors"
    result = run(MODEL, "--prompts", short, "--output", file, "--memory", BUDGET, "--width", "2", "--no-control")
    assert result.returncode == 0, result.stderr
    assert "untrained" not in result.stdout
    assert "of a token's true experts, named" in result.stdout
    assert f"poise: wrote {file}" in result.stderr
    other = tmp_path / "other"
    other.mkdir()
    for entry in MODEL.iterdir():
        (other / entry.name).write_bytes(entry.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(TraceError, match="and this one is"):
        LLM(other, memory=BUDGET, lookahead=LookaheadUse(file=file))


def test_an_interrupted_run_leaves_no_file(text: Path, tmp_path: Path) -> None:
    argv = command(MODEL, "--prompts", text, "--output", tmp_path / "p", "--memory", BUDGET, "--epochs", "99")
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/no/such/model", "--prompts", "{good}", "--output", "{out}"), "no such model directory"),
        (("{model}", "--prompts", "{good}", "--output", "{out}"), "a predictor needs 4096: give more"),
        (("{model}", "--prompts", "{bad}", "--output", "{out}"), "bad.jsonl line 2"),
        (("{model}", "--prompts", "{good}", "--output", "{out}", "--width", "0"), "--width is 0"),
        (("{model}", "--prompts", "{good}", "--output", "{out}", "--epochs", "0"), "--epochs is 0"),
    ],
)
def test_bad_input_gets_one_clear_line_and_leaves_no_file(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    places = {"model": str(MODEL), "out": str(tmp_path / "out"), "folder": str(tmp_path)}
    good, bad = '{"prompt_token_ids": [5, 6]}\n', '{"prompt_token_ids": [5]}\n{"prompt_token_ids": [99999]}\n'
    for name, content in (("good", good), ("bad", bad)):
        places[name] = str(tmp_path / f"{name}.jsonl")
        Path(places[name]).write_text(content)
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("poise: ")
    assert said in line
    assert result.stdout == ""
    assert not Path(places["out"]).exists()
