"""`poise record` as a user runs it, on the bundled model: a trace, a table, a summary, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import poise
from poise import LLM, SamplingParams
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.predict.correlation import CorrelationTable
from poise.spec.trace import RoutingTrace

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
BUDGET = "400MiB"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "poise", "record", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def main():\nThe file is\n")
    return path


def test_two_prompts_give_a_trace_a_table_and_a_summary(prompts: Path, tmp_path: Path) -> None:
    trace_file, table_file = tmp_path / "trace.safetensors", tmp_path / "table.safetensors"
    result = run(
        *(MODEL, "--prompts", prompts, "--output", trace_file, "--table", table_file, "--max-tokens", "4"),
        *("--memory", BUDGET, "--json"),
    )
    assert result.returncode == 0, result.stderr
    summary, trace = json.loads(result.stdout), RoutingTrace.load(trace_file)
    assert trace.counts_NLE.shape == (4, 6, 32)
    assert (summary["steps"], summary["tokens"], summary["top_k"]) == (4, sum(trace.tokens_per_step), 4)
    assert [row["layer"] for row in summary["layers"]] == list(trace.layers) == list(range(6))
    for row, load_E in zip(summary["layers"], trace.load_LE, strict=True):
        assert row["max_over_mean"] == pytest.approx(load_E.max() / load_E.mean())
    fingerprint = model_fingerprint(open_checkpoint(MODEL))
    assert trace.model == f"tiny-moe@{fingerprint}"
    assert CorrelationTable.load(table_file, model=fingerprint).num_experts == 32
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "prompts.txt",
        "table.safetensors",
        "trace.safetensors",
    ]
    prompt, params = "def main():", SamplingParams(max_tokens=6)
    texts = []
    for table in (None, table_file):
        with LLM(MODEL, memory="1GiB", expert_slots=40, correlation_table=table) as llm:
            texts.append(llm.generate(prompt, params)[0].outputs[0].text)
    assert texts[0] == texts[1]


def test_without_json_a_table_is_printed(prompts: Path, tmp_path: Path) -> None:
    result = run(*(MODEL, "--prompts", prompts, "--output", tmp_path / "t", "--max-tokens", "1", "--memory", BUDGET))
    assert result.returncode == 0, result.stderr
    assert "max/mean" in result.stdout
    assert f"poise: wrote {tmp_path / 't'}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/no/such/model", "--prompts", "{good}", "--output", "{out}"), "no such model directory"),
        (("{model}", "--prompts", "{missing}", "--output", "{out}"), "cannot be read"),
        (("{model}", "--prompts", "{bad}", "--output", "{out}"), "line 2"),
        (("{model}", "--prompts", "{long}", "--output", "{out}"), "long.jsonl line 1"),
        (("{model}", "--prompts", "{good}", "--output", "{folder}"), "is not a regular file"),
        (("{model}", "--prompts", "{good}", "--output", "{folder}/none/t"), "does not exist; create it"),
        (("{model}", "--prompts", "{good}", "--output", "{out}", "--table", "{out}"), "give two names"),
        (("{model}", "--prompts", "{good}", "--output", "{out}", "--max-tokens", "0"), "max_tokens is 0"),
        (("{model}", "--prompts", "{good}", "--output", "{out}", "--memory", "lots"), "8GiB"),
        (("{model}", "--prompts", "{good}"), "--output"),
    ],
)
def test_bad_input_gets_one_clear_line_and_leaves_no_file(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    files = {
        "good": '{"prompt_token_ids": [5, 6]}\n',
        "bad": '{"prompt_token_ids": [5]}\n{"prompt": \n',
        "long": json.dumps({"prompt_token_ids": [5] * 2000}) + "\n",
    }
    places = {"model": str(MODEL), "out": str(tmp_path / "out"), "folder": str(tmp_path)}
    for name in (*files, "missing"):
        places[name] = str(tmp_path / f"{name}.jsonl")
    for name, text in files.items():
        Path(places[name]).write_text(text)
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("poise: ")
    assert said in line
    assert result.stdout == ""
    assert not Path(places["out"]).exists()
