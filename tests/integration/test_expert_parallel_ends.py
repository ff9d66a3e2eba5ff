"""How an expert-parallel run ends before it is done, as a user sees it: one line that says who, what is kept, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poise import LLM, SamplingParams
from poise.cli.generate_options import AUTO, BALANCES, MOST_REPLICA_SLOTS, STEPWISE
from poise.engine import balances
from poise.engine.lookahead_use import LookaheadUse
from poise.errors import UsageError
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.model.lookahead import LOOKAHEAD_FORMAT
from poise.parallel.step_options import StepOptions
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.ranks import free_port

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
POISE = ["-m", "poise", "generate"]
OPTIONS = ["--memory", "1GiB", "--ignore-eos", "--expert-parallel"]


@contextmanager
def running(commands: Sequence[Sequence[str]], directory: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Commands with a session, and a file ``N.log`` for stderr, each; killed with all they started."""
    processes = []
    port = str(free_port())
    common = {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
    }
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with (directory / f"{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=common | place,
                    start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored behind a shell's "&"
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(directory: Path) -> list[str]:
    """Lines of all commands for users, those about the model left out."""
    lines = [line for log in sorted(directory.glob("*.log")) for line in log.read_text().splitlines()]
    return [line for line in lines if line.startswith("poise: ") and "dtype" not in line and "architecture" not in line]


def wait_for_a_result(output: Path) -> None:
    """Until the journal has one."""
    journal, deadline = output.with_name(f"{output.name}.partial"), time.monotonic() + 90
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline, "no result is finished"
        time.sleep(0.02)


@pytest.fixture
def prompt_file(draw_prompts: DrawPrompts, tmp_path: Path) -> Path:
    """One short text and three long ones."""
    lines = [
        {"prompt_token_ids": ids, "max_tokens": 2 if n == 0 else 220} for n, ids in enumerate(draw_prompts([9] * 4))
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_ctrl_c_says_what_is_kept_once_and_resume_ends_with_the_same_texts(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C goes to the launcher and all ranks."""
    path, broken = checkpoint("qwen3_moe"), tmp_path / "broken.jsonl"
    asked = [*POISE, str(path), "--prompts", str(prompt_file), *OPTIONS]
    launcher = [*TORCHRUN, "--master-port", str(free_port())]
    with running([[*launcher, *asked, "--output", str(broken)]], tmp_path) as (process,):
        wait_for_a_result(broken)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) != 0
    kept = f"results are kept in {broken}.partial; to continue, give the same command with --resume"
    lines = said(tmp_path)
    assert sum(kept in line for line in lines) == 1, (tmp_path / "0.log").read_text()
    assert sum("interrupted" in line for line in lines) == 1, lines
    subprocess.run([*launcher, *asked, "--output", str(broken), "--resume"], check=True, timeout=90)
    lines_asked = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    with LLM(path, memory="1GiB") as llm:
        alone = llm.generate(
            [{"prompt_token_ids": line["prompt_token_ids"]} for line in lines_asked],
            [SamplingParams(max_tokens=line["max_tokens"], ignore_eos=True) for line in lines_asked],
        )
    resumed = [json.loads(line)["token_ids"] for line in broken.read_text().splitlines()]
    assert resumed == [list(each.outputs[0].token_ids) for each in alone]


@pytest.mark.slow
def test_sigterm_to_all_ranks_says_who_and_what_is_kept_and_ends_with_its_exit_code(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    asked = [*POISE, str(checkpoint("qwen3_moe")), "--prompts", str(prompt_file), *OPTIONS, "--output", str(output)]
    with running([[sys.executable, *asked]] * 2, tmp_path) as processes:
        wait_for_a_result(output)
        for process in processes:
            process.terminate()
        assert [process.wait(30) for process in processes] == [128 + signal.SIGTERM] * 2
    who, kept = sorted(said(tmp_path), key=lambda line: "kept" in line)
    assert who.endswith("was told to end (SIGTERM); all ranks end")
    assert "of 4 results are kept in" in kept
    assert "--resume" in kept


def test_a_rank_with_another_checkpoint_is_refused_in_one_line(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    """One matrix of one expert differs, as after a fine-tuning that leaves all vectors alone."""
    path, other = checkpoint("qwen3_moe"), tmp_path / "other"
    shutil.copytree(path, other)
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "experts" in name and "down_proj" in name)
    save_file({**tensors, name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
    commands = [
        [sys.executable, *POISE, str(model), "--prompts", str(prompt_file), *OPTIONS] for model in (path, other)
    ]
    with running(commands, tmp_path) as processes:
        assert [process.wait(60) for process in processes] == [2, 2]
    (line,) = said(tmp_path)
    assert line.startswith("poise: rank 1 has checkpoint ")
    assert line.endswith("; give every rank the same MODEL")


@pytest.mark.parametrize(
    ("model", "option", "line"),
    [
        ("{model}", ("--balance", "nonsense"), "balance 'nonsense' is not supported; choose one of auto, "),
        pytest.param("no-model", (), "no such model directory: no-model", marks=pytest.mark.slow),
        pytest.param(
            "{model}",
            ("--lookahead", "{nothing}"),
            "lookahead predictor {nothing} cannot be read",
            marks=pytest.mark.slow,
        ),
        ("{model}", ("--lookahead", "{others}"), "lookahead predictor {others} is of model 0123, and this one is "),
    ],
)
def test_what_is_wrong_on_every_rank_is_said_once(
    model: str, option: Sequence[str], line: str, checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    places = {"model": checkpoint("qwen3_moe"), "nothing": tmp_path / "nothing", "others": tmp_path / "others"}
    save_lookahead(places["others"], "0123")
    asked = [*POISE, model.format(**places), "--prompts", str(prompt_file), *OPTIONS]
    asked += [word.format(**places) for word in option]
    with running([[sys.executable, *asked]] * 2, tmp_path) as processes:
        assert [process.wait(60) for process in processes] == [2, 2]
    (said_line,) = said(tmp_path)
    assert said_line.startswith("poise: " + line.format(**places))
    assert (tmp_path / "1.log").read_text() == ""


def save_lookahead(file: Path, model: str) -> None:
    tensors = {"inner": np.zeros((1, 2, 64), np.float32), "outer": np.zeros((1, 8, 2), np.float32)}
    LOOKAHEAD_FORMAT.save(file, tensors, {"model": model, "layers": [1]})


@pytest.mark.slow
def test_predictors_that_differ_are_refused_in_one_line(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    asked = [sys.executable, *POISE, str(path), "--prompts", str(prompt_file), *OPTIONS, "--lookahead"]
    for name, seed in (("0", 0), ("1", 1)):
        with LLM(path, memory="1GiB", lookahead=LookaheadUse(width=2 + seed)) as llm:
            assert llm.lookahead is not None
            llm.lookahead.save(tmp_path / name, model=model_fingerprint(open_checkpoint(path)))
    with running([[*asked, str(tmp_path / name)] for name in ("0", "1")], tmp_path) as processes:
        assert [process.wait(60) for process in processes] == [2, 2]
    (line,) = said(tmp_path)
    assert re.fullmatch(r"poise: rank 1 has lookahead \w{12}, rank 0 has \w{12}; give every rank the same file", line)


def test_the_command_knows_what_the_engine_has() -> None:
    assert (AUTO, *balances.BALANCES) == BALANCES
    assert tuple(name for name, named in balances.BALANCES.items() if named.steps is not None) == STEPWISE
    assert AUTO == balances.AUTO
    assert StepOptions(replica_slots=MOST_REPLICA_SLOTS)
    with pytest.raises(UsageError, match="planned 'before'; choose one of auto, inline, thread"):
        StepOptions(ahead="before")
    with pytest.raises(UsageError, match="replica slots are 17"):
        StepOptions(replica_slots=MOST_REPLICA_SLOTS + 1)
