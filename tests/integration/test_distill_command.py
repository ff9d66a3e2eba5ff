"""`poise distill` as a user runs it, on the bundled model: a file that predicts, figures, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import poise
from poise import LLM, SamplingParams
from poise.cli.distill import DistillOptions, run_distill
from poise.engine import lookahead_control
from poise.engine.lookahead_use import LookaheadUse
from poise.engine.parallel_llm import ParallelLLM
from poise.errors import TraceError
from poise.parallel.launch import Launch
from poise.units import MIB
from tests.ranks import free_port, start_ranks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
BUDGET = "500MiB"
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
TIGHT = "96MiB"
"""In fp32 not all experts fit."""


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


@pytest.fixture(scope="module")
def distilled(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file, and what --json says of it."""
    file = tmp_path_factory.mktemp("distilled") / "p.safetensors"
    result = run(MODEL, "--prompts", text, "--output", file, "--memory", BUDGET, "--width", "32", "--json")
    assert result.returncode == 0, result.stderr
    return file, json.loads(result.stdout)


def test_predictors_are_learnt_examined_and_written(distilled: tuple[Path, dict[str, Any]]) -> None:
    file, summary = distilled
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
    assert [entry.name for entry in file.parent.iterdir()] == ["p.safetensors"]
    with LLM(MODEL, memory=BUDGET, lookahead=LookaheadUse(file=file)) as llm:
        assert llm.lookahead is not None
        assert llm.lookahead.learning_layers == (1, 2, 3, 4, 5)
        assert all(llm.lookahead.residual(layer).outer_EW.any() for layer in (1, 5))


@pytest.mark.slow
def test_a_control_that_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a model over 2 GiB."""
    monkeypatch.setattr(lookahead_control, "MOST_BYTES", MIB)
    source = (Path(os.__file__).parent / "textwrap.py").read_text()
    prompts = tmp_path / "text.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": source[at : at + 4000]}) + "\n" for at in range(0, 16_000, 4000)))
    options = DistillOptions(
        model=str(MODEL),
        prompt_file=str(prompts),
        output=tmp_path / "p.safetensors",
        width=8,
        epochs=1,
        control=None,
        memory=BUDGET,
        json_output=True,
    )
    run_distill(options)
    said = capsys.readouterr()
    assert "no untrained control: the weights are over 1 MiB; --control runs one all the same" in said.err
    assert "untrained" not in json.loads(said.out)["mean"]["recall"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Prompts of text that was not learnt from, and what one process that streams its experts generates for them."""
    folder = Path(os.__file__).parent
    texts = [(folder / f"{name}.py").read_text()[200:1400] for name in ("shlex", "queue", "bisect", "statistics")]
    path = tmp_path_factory.mktemp("asked") / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "max_tokens": 8}) + "\n" for text in texts))
    with LLM(MODEL, memory=BUDGET, dtype="float32") as llm:
        made = llm.generate(texts, PARAMS)
    return path, [list(each.outputs[0].token_ids) for each in made]


def generated(command: Sequence[str | Path], prompts: Path, memory: str = BUDGET) -> tuple[dict[str, Any], str]:
    """What --json says, and what people are told."""
    options = ["--prompts", prompts, "--memory", memory, "--dtype", "float32", "--ignore-eos", "--json"]
    argv = [str(word) for word in (*command, *options)]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def unlearnt(launch: Launch, prompts: list[str]) -> tuple[list[list[int]], float]:
    """What ranks do unasked: tokens, and the share of them that was predicted for other experts."""
    with ParallelLLM(MODEL, launch, memory=BUDGET, dtype="float32") as llm:
        if launch.rank > 0:
            llm.follow()
            return [], 0.0
        made = llm.generate(prompts, PARAMS)
        assert llm.predictor == "frozen routers, asked a layer early (5 of 6 layers)"
        assert llm.step_figures is not None
        return [list(each.outputs[0].token_ids) for each in made], llm.step_figures.to_json()["guessed_wrong_frac"]


def test_two_ranks_predict_by_it_and_generate_what_one_process_does(
    distilled: tuple[Path, dict[str, Any]], asked: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    prompts, wanted = asked
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--master-port", str(free_port()), "-m", "poise", "generate", MODEL, "--expert-parallel"]
    document, told = generated([*command, "--balance", "probe", "--lookahead", distilled[0], "--online"], prompts)
    assert [result["token_ids"] for result in document["results"]] == wanted
    predictor = "distilled routers, asked a layer early (5 of 6 layers), learning online"
    assert (document["plan"]["balance"], document["plan"]["predictor"]) == ("probe", predictor)
    balanced = document["stats"]["parallel"]["balanced"]
    wrong_frac = balanced["guessed_wrong_frac"]
    assert f"predicted by {predictor}: {1 - wrong_frac:.0%} of the tokens" in told
    assert len(balanced["layers"]["guessed_wrong"]) == 6
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    tokens, frozen_frac = start_ranks(unlearnt, 2, tmp_path, texts).results(within_s=120)[0]
    assert tokens == wanted
    assert wrong_frac < 0.8 * frozen_frac, "what was learnt predicts better"


def test_one_process_learns_on(
    distilled: tuple[Path, dict[str, Any]], asked: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    prompts, wanted = asked
    often = tmp_path / "often.jsonl"
    often.write_text(prompts.read_text() * 10)
    command = [sys.executable, "-m", "poise", "generate", MODEL, "--lookahead", distilled[0], "--online"]
    document, told = generated(command, often)
    found = re.search(r"learnt online: (\d+) steps of learning, (\d+\.\d)% of the time$", told, re.MULTILINE)
    assert found is not None, told
    assert int(found[1]) > 0
    assert float(found[2]) < 10.0
    assert [result["token_ids"] for result in document["results"]] == wanted * 10


def test_one_process_reads_ahead_by_it(
    distilled: tuple[Path, dict[str, Any]], asked: tuple[Path, list[list[int]]]
) -> None:
    command = [sys.executable, "-m", "poise", "generate", MODEL, "--lookahead", distilled[0]]
    document, _ = generated(command, asked[0], TIGHT)
    assert document["plan"]["expert_slots"] < document["plan"]["experts"]
    assert document["stats"]["decode_ahead"]["used_frac"] > 0.5
    assert [result["token_ids"] for result in document["results"]] == asked[1]
    assert document["plan"]["foreseen_by"] == "distilled routers, asked a layer early, else the correlation table"


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
