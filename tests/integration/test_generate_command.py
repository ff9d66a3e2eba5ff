"""`poise generate` as a user runs it: files in, files out, interruption and resumption, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DrawPrompts, MakeCheckpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
BUDGET = "400MiB"


def poise(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "poise", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=300)


@pytest.fixture
def model(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture
def prompts(tmp_path: Path, draw_prompts: DrawPrompts) -> Path:
    path = tmp_path / "prompts.jsonl"
    ids = draw_prompts([4, 19, 7, 30, 1, 12], seed=5)
    lines = [
        {"prompt_token_ids": each, "id": f"q{number}", "max_tokens": 4 + number} for number, each in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_come_in_the_order_of_the_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    result = poise("generate", model, "--prompts", prompts, "--output", output, "--memory", BUDGET, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"q{number}" for number in range(6)]
    assert [len(answer["token_ids"]) for answer in answers] == [4 + number for number in range(6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    assert "tokens/s" in result.stderr
    assert "expert hits" in result.stderr


def test_json_holds_results_figures_and_plan(model: Path, prompts: Path) -> None:
    result = poise("generate", model, "--prompts", prompts, "--memory", BUDGET, "--json", "--ignore-eos")
    document = json.loads(result.stdout)
    assert len(document["results"]) == 6
    assert document["stats"]["generated_tokens"] == sum(4 + number for number in range(6))
    assert document["stats"]["peak_bytes"] - document["stats"]["base_bytes"] <= document["stats"]["budget_bytes"]
    assert document["plan"]["expert_slots"] >= 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("poise: plan: "))
    plan, measured = document["plan"], document["stats"]["generated_tokens_per_s"]
    for said in (
        f"{plan['num_batches']} x {plan['batch_size']} rows",
        f"{plan['prefetch_experts']} experts read ahead",
        f"{plan['expert_slots']} of {plan['experts']} experts in memory",
        "keys and values in memory",
        f"bottleneck: {plan['bottleneck']}",
        f"({plan['bound_frac']:.0%} of what perfect overlap would give; costs estimated",
    ):
        assert said in line
    for figure, said in ((measured, "measured"), (plan["predicted_tokens_per_s"], "predicted")):
        (found,) = re.findall(rf"([\d.,]+) (?:tokens/s )?{said}", line)
        assert float(found.replace(",", "")) == pytest.approx(figure, rel=0.005)


def test_an_interrupted_run_leaves_no_partial_file_and_resumes_to_the_same_answers(
    model: Path, tmp_path: Path, draw_prompts: DrawPrompts
) -> None:
    prompts = tmp_path / "many.jsonl"
    lines = [
        {"prompt_token_ids": ids, "max_tokens": 8 if n < 20 else 200} for n, ids in enumerate(draw_prompts([9] * 40))
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    common = ("generate", model, "--prompts", prompts, "--memory", BUDGET, "--ignore-eos")
    argv = [sys.executable, "-m", "poise", *map(str, common), "--output", str(broken)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not any(_lines(path) > 3 for path in tmp_path.glob("broken*")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--resume" in said
    assert not broken.exists()
    resumed = poise(*common, "--output", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert poise(*common, "--output", whole).returncode == 0
    assert broken.read_text() == whole.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "many.jsonl", "whole.jsonl"]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("/no/such/model", "x"), "no such model directory"),
        (("{model}", "--prompts", "{bad}"), "line 2"),
        (("{model}", "--prompts", "{empty}"), "empty"),
        (("{model}", "--prompts", "{long}"), "long.jsonl line 1: it has 300 tokens"),
        (("{model}", "--prompts", "{good}", "--memory", "9MiB"), "the smallest that works is"),
        (("{model}", "--prompts", "{good}", "--memory", "lots"), "8GiB"),
        (("{model}", "--prompts", "{good}", "--temperature", "-1"), "temperature"),
        (("{model}", "some text", "--memory", BUDGET), "tokenizer"),
        (("{model}", "--promts", "x"), "--promts"),
    ],
)
def test_bad_input_gets_one_clear_line(model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    files = {
        "good": '{"prompt_token_ids": [5, 6]}\n',
        "bad": '{"prompt_token_ids": [5]}\n{"prompt": \n',
        "empty": "",
        "long": json.dumps({"prompt_token_ids": [5] * 300}) + "\n",
    }
    places = {"model": str(model)}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
        places[name] = str(tmp_path / f"{name}.jsonl")
    result = poise("generate", *(argument.format(**places) for argument in arguments))
    plan = ("poise: dtype", "poise: architecture")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(plan)]
    assert result.returncode == 2
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("poise: ")
    assert said in lines[0]
    assert result.stdout == ""


def test_experts_are_rounded_once_and_the_dtype_is_said(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7]}\n')
    common = ("generate", checkpoint("qwen3_moe", "float16"), "--prompts", prompts, "--memory", BUDGET, "--json")
    runs = [poise(*common, "--quantize", "int4", XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert ["relative weight error" in run.stderr for run in runs] == [True, False]
    for run in runs:
        assert "\npoise: dtype: " in "\n" + run.stderr
        assert "checkpoint is float16" in run.stderr
    first, second = (json.loads(run.stdout) for run in runs)
    assert first["results"] == second["results"]
    assert first["plan"]["quantize"] == "int4"
    assert "Traceback" not in "".join(run.stderr for run in runs)
