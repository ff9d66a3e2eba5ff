"""A rank that is lost, interrupted or stuck while it serves replicas ends the job in bounded time, by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.parallel.launch import Launch
from poise.parallel.replica_track import ReplicaTrack
from poise.parallel.step_options import StepOptions
from poise.parallel.watch import Patience
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.parallel.test_probe import dawdle_in
from tests.ranks import start_ranks

QUICK = Patience(start_s=60.0, beat_s=0.1, silent_s=2.0, behind_s=2.0, leave_s=4.0)
WITHIN_S = 15.0


def generate(launch: Launch, path: Path, prompts: list[list[int]], directory: Path, act: str, ahead: str) -> None:
    """Rank 1 does something when it is to give its first chunk."""
    answer = ReplicaTrack._answer

    def meddle(self: ReplicaTrack) -> None:
        if self._questions and self._is_open:
            (directory / "began").touch()
            if act == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if act == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        answer(self)

    if launch.rank == 1:
        ReplicaTrack._answer = meddle  # type: ignore[method-assign]
    steps: dict[str, Any] = {"balance": "probe", "steps": StepOptions(predictor="last", rests=False, ahead=ahead)}
    with ParallelLLM(path, launch, memory="2GiB", patience=QUICK, groups=[(2, 1)], **steps) as llm:
        dawdle_in(llm.runner.model)
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=240, ignore_eos=True)
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)


@pytest.mark.parametrize(
    ("act", "ahead", "codes", "said"),
    [
        ("die", "thread", [1, -signal.SIGKILL, 1], "rank 1 has died"),
        ("interrupt", "inline", [1, 130, 1], "rank 1 gave up: interrupted"),
        ("stall", "inline", [1, 1, 1], "does not come from rank 1"),
    ],
)
def test_all_ranks_end(
    act: str,
    ahead: str,
    codes: list[int],
    said: str,
    checkpoint: MakeCheckpoint,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    prompts = draw_prompts((5, 7, 9, 6, 8, 4, 3, 7, 9, 5, 6, 8))
    ranks = start_ranks(generate, 3, tmp_path, checkpoint("qwen3_moe"), prompts, tmp_path, act, ahead)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline, "\n".join(ranks.output(rank) for rank in range(3))
        time.sleep(0.02)
    began_s = time.monotonic()
    assert ranks.wait(within_s=30) == codes, "\n".join(ranks.output(rank) for rank in range(3))
    assert time.monotonic() - began_s < WITHIN_S
    lines = [line for rank in range(3) for line in ranks.output(rank).splitlines() if line.startswith("error: ")]
    assert lines or act == "interrupt", "nobody says what is wrong"  # the command of rank 1 says it
    assert all(said in line for line in lines)
    assert len(lines) == 1 or act == "interrupt"
