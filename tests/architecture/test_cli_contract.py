"""The command line that users and scripts rely on: flags, help, start-up, and how it refuses."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.models import OptionInfo

import poise
from poise.cli import bench_commands, measure_commands, run_commands

POISE = (sys.executable, "-m", "poise")

FLAGS = {
    "generate": (
        "--prompts --output --resume --overwrite --max-tokens --memory --device --device-memory --dtype --quantize --machine "
        "--timeline --correlation-table --save-table --temperature --top-p --top-k --seed --stop --ignore-eos "
        "--expert-parallel --balance --lookahead --online --replica-slots --json"
    ),
    "plan": (
        "--prompts --num-requests --prompt-tokens --max-tokens --memory --device --device-memory --dtype --quantize --machine "
        "--correlation-table --trace --json"
    ),
    "demo": "--json",
    "profile": "--merge --output --report --json",
    "distill": "--prompts --output --width --epochs --control --memory --json",
    "record": "--prompts --output --table --max-tokens --memory --json",
    "place": (
        "--trace --machine --ranks --slots-per-rank --shape --current --max-moves --format --first-layer --num-layers "
        "--output --report --json"
    ),
    "bench": "--output --json",
}


def run_poise(arguments: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*POISE, *arguments], capture_output=True, text=True, check=False, cwd=folder, timeout=60)


def refusal_of(arguments: Sequence[str], folder: Path | None = None) -> str:
    """The one line on standard error of a command that must be refused."""
    run = run_poise(arguments, folder)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("poise: ")
    return line


def test_the_root_lists_the_commands_and_an_example() -> None:
    for arguments in ([], ["--help"]):
        run = run_poise(arguments)
        assert run.returncode == 0
        assert "Example: poise generate" in run.stdout
        assert all(command in run.stdout for command in FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_has_its_flags_and_an_example(command: str) -> None:
    run = run_poise([command, "--help"])
    assert run.returncode == 0
    assert [flag for flag in FLAGS[command].split() if f" {flag} " not in run.stdout] == []
    assert "Example" in run.stdout
    assert f"poise {command}" in run.stdout.split("Example")[1]


def test_there_is_no_flag_beyond_the_contract() -> None:
    shown = {word for word in run_poise(["generate", "--help"]).stdout.split() if word.startswith("--")}
    assert {word.strip(",:;.") for word in shown} == {
        *FLAGS["generate"].split(),
        "--help",
        "--nproc-per-node",  # torchrun's, in an example
    }


def test_a_flag_that_its_metavar_spells_is_named() -> None:
    """Typer 0.27 else takes the metavar for the flag: `--DEVICE`."""
    spelled = []
    for group in (run_commands, measure_commands, bench_commands):
        for command in group.commands.registered_commands:
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                for option in getattr(hint, "__metadata__", ()):
                    if isinstance(option, OptionInfo) and (option.metavar or "").lower() == name:
                        assert f"--{name}" in (option.default, *option.param_decls), "Annotated's first is `default`"
                        spelled.append(name)
    assert "device" in spelled


def test_version() -> None:
    assert run_poise(["--version"]).stdout == f"poise {poise.__version__}\n"


def test_help_answers_at_once() -> None:
    user_s, wall_s = [], []
    for _ in range(3):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
        assert run_poise(["--help"]).returncode == 0
        wall_s.append(time.monotonic() - start)
        user_s.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(user_s) < 0.5
    assert min(wall_s) < 5, "even on a busy machine"


def test_the_command_line_starts_without_torch() -> None:
    script = "import sys, poise.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "numpy"} & set(loaded) == set()
    assert "typer" in loaded


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "m", "x", "--quantise"], "No such option: --quantise"),
        (["generat"], "No such command 'generat'"),
        (["generate"], "Missing argument 'MODEL'"),
        (["generate", "m", "x", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["generate", "m", "x", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["generate", "m", "x", "--temperature", "nan"], "temperature is nan; it must be 0 (greedy), or 1e-06 or more"),
        (["generate", "m", "x", "--quantize", "int8"], "quantize 'int8' is not supported; choose one of none, int4"),
        (["generate", "m", "x", "--memory", "lots"], "memory size 'lots' is not understood"),
        (["generate", "m", "x", "--memory", "9" * 400 + "GiB"], "is more than 1 EiB; write, for example, 8GiB"),
        (
            ["generate", "m", "x", "--temperature", "1e-45"],
            "temperature is 1e-45; it must be 0 (greedy), or 1e-06 or more",
        ),
        (
            ["generate", "m", "x", "--balance", "probe"],
            "--balance is about ranks that share the experts; give --expert-",
        ),
        (
            ["generate", "m", "x", "--online"],
            "--online has a lookahead predictor go on learning; give one with",
        ),
        (
            ["generate", "m", "x", "--expert-parallel", "--balance", "eplb", "--online"],
            "--online is about replicas, and --balance eplb brings none",
        ),
        (["generate", "m", "x", "--replica-slots", "3"], "--replica-slots is about ranks that share the experts; give"),
        (
            ["generate", "m", "x", "--expert-parallel", "--balance", "vibe+probe"],
            "balance 'vibe+probe' is not supported; choose one of auto, static, eplb, vibe, probe, probe+vibe",
        ),
        (
            ["generate", "m", "x", "--expert-parallel", "--balance", "vibe", "--lookahead", "p"],
            "--lookahead is about replicas, and --balance vibe brings none; leave it out, or give --balance probe or",
        ),
        (
            ["generate", "m", "x", "--expert-parallel", "--balance", "static", "--replica-slots", "3"],
            "--replica-slots is about replicas, and --balance static brings none",
        ),
        (
            ["generate", "m", "x", "--expert-parallel", "--replica-slots", "17"],
            "--replica-slots is 17; it must be from 1 to 16",
        ),
        (["generate", "", "x"], "model '' names nothing; give a folder"),
        (["generate", "m"], "no prompt is given"),
        (["generate", "m", "x", "--prompts", "in.jsonl"], "use one of the two"),
        (["generate", "m", "--prompts", "none.jsonl"], "prompt file 'none.jsonl' cannot be read"),
        (["generate", "m", "--prompts", "bad.jsonl"], "bad.jsonl line 2: the line is not valid JSON"),
        (["generate", "m", "x", "--resume"], "name it with --output"),
        (["generate", "m", "x", "--resume", "--overwrite", "--output", "o"], "contradict each other"),
        (["generate", "m", "x", "--output", "bad.jsonl"], "output file"),
        (["generate", "m", "x", "--output", "none/out.jsonl"], "does not exist; create it"),
        (["generate", "m", "x", "--save-table", "none/t"], "does not exist; create it"),
        (["generate", "m", "x", "--save-table", "t", "--timeline", "t"], "name the same file t; give two names"),
        (["plan", "none"], "no such model directory: none"),
        (["plan", "m", "--prompts", "bad.jsonl"], "bad.jsonl line 2: the line is not valid JSON"),
        (["plan", "m", "--prompts", "bad.jsonl", "--num-requests", "3"], "leave out --num-requests"),
        (["plan", "m", "--memory", "lots"], "memory size 'lots' is not understood"),
        (["profile", "--output", "none/machine.json"], "does not exist; create it"),
        (["profile", "--report", "."], "is not a regular file; name a file to write"),
        (["profile", "--output", "same", "--report", "same"], "name the same file same; give two names"),
        (["profile", "none", "--output", "machine.json"], "no such model directory: none"),
        (["profile", "a", "b"], "2 models are given; profile one, or put machine files together with --merge"),
        (["profile", "--merge", "bad.jsonl"], "machine file bad.jsonl is not JSON"),
        (["profile", "--merge"], "0 machine files are given; two or more can be put together"),
        (["place", "--trace", "t"], "Missing option '--machine'"),
        (
            ["place", "--trace", "t", "--machine", "h300", "--ranks", "8"],
            "neither a file nor one of h100, h200, one-slow",
        ),
        (["place", "--trace", "t", "--machine", "h200", "--ranks", "0"], "--ranks is 0; it must be from 1 to 512"),
        (["place", "--trace", "t", "--machine", "h200", "--ranks", "8"], "choose one with --shape: 2048x512:bfloat16"),
        (
            ["place", "--trace", "t", "--machine", "h200", "--ranks", "8", "--shape", "1x1:bfloat16"],
            "--shape '1x1:bfloat16' is none of the machine's",
        ),
        (
            ["place", "--trace", "t", "--machine", "h200", "--ranks", "8", "--shape", "2048x768:bfloat16"],
            "statistics t do not exist",
        ),
        (
            ["place", "--trace", "t", "--machine", "h200", "--ranks", "8", "--format", "vllm"],
            "format 'vllm' is not known",
        ),
        (
            ["place", "--trace", "t", "--machine", "h200", "--ranks", "8", "--output", "none/p.json"],
            "does not exist; create it",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\nnonsense\n')
    assert complaint in refusal_of(arguments, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_finished_output_needs_no_model(tmp_path: Path) -> None:
    result = {"index": 0, "id": "a", "prompt": "x", "text": " y", "token_ids": [4], "finish_reason": "length"}
    (tmp_path / "out.jsonl").write_text(json.dumps(result) + "\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "id": "a"}\n')
    run = run_poise(["generate", "m", "--prompts", "in.jsonl", "--output", "out.jsonl", "--resume", "--json"], tmp_path)
    assert run.returncode == 0
    assert run.stderr == (
        "poise: all done: the 1 results are in out.jsonl; the file does not say of which model and sampling: "
        "compared were the prompts\n"
    )
    assert json.loads(run.stdout) == {"results": [result], "stats": None, "plan": None}


def test_ctrl_c_is_one_line_and_exit_code_130() -> None:
    process = subprocess.Popen(
        [*POISE, "generate", "m", "--prompts", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None
    process.stdin.write(b"x" * (1 << 20))  # more than a pipe holds: this returns once poise reads
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert complaint == b"poise: interrupted\n"
    assert process.returncode == 130


def test_an_interrupt_within_code_made_from_text_is_exit_code_130(tmp_path: Path) -> None:
    """Python else ends a `python -m` by SIGINT for it at the very end: with dataclasses while torch loads, 3 of 24 runs."""
    (tmp_path / "interrupted.py").write_text(
        "import poise.cli\n"
        "def run(arguments):\n"
        "    try:\n"
        "        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n"
        "        return 130\n"
        "poise.cli._run = run\n"
        "poise.cli.main()\n"
    )
    run = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, timeout=60, check=False)
    assert run.returncode == 130


def test_sigterm_before_any_result_is_one_line_exit_code_143_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5]}\n')
    model = str(Path(poise.__file__).with_name("assets") / "tiny-moe")
    arguments = ["generate", model, "--prompts", "in.jsonl", "--output", "out.jsonl"]
    process = subprocess.Popen([*POISE, *arguments], stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.jsonl.partial").exists():  # from here on torch loads, for a second or more
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.1)
    for _ in range(2):  # as `timeout` does: to the process, and to its group
        process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=30)
    assert complaint == b"poise: interrupted; no result was finished, and nothing is left behind\n"
    assert process.returncode == 143
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_help_says_what_an_interrupted_run_leaves() -> None:
    said = " ".join(run_poise(["generate", "--help"]).stdout.replace("│", " ").split())
    assert "FILE.partial, which an interrupted run keeps for --resume if it holds any" in said
