"""A rank that is lost, interrupted or stuck while experts are on their way ends the job in bounded time, by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.parallel.group import Channel
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.parallel.test_parallel_llm import Rotate
from tests.ranks import Ranks, start_ranks

QUICK = Patience(start_s=60.0, beat_s=0.1, silent_s=2.0, behind_s=4.0, leave_s=4.0)
WITHIN_S = 15.0


def generate(launch: Launch, path: Path, prompts: list[list[int]], directory: Path, act: str) -> None:
    """Rank 1 does something in the middle of the first expert that it gets."""
    receive = Channel.receive

    def meddle(self: Channel, tensor: torch.Tensor, rank: int) -> None:
        (directory / "began").touch()
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if act in ("interrupt", "stall"):
            time.sleep(60)
        receive(self, tensor, rank)

    if launch.rank == 1:
        Channel.receive = meddle  # type: ignore[method-assign]
    with ParallelLLM(path, launch, memory="2GiB", patience=QUICK, policy=Rotate(interval=2)) as llm:
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=100 if act == "stall" else 200, ignore_eos=True)
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)


def run(act: str, path: Path, prompts: list[list[int]], directory: Path) -> tuple[Ranks, list[int | None], list[str]]:
    """The ranks, their exit codes, and the lines that users see."""
    ranks = start_ranks(generate, 3, directory, path, prompts, directory, act)
    deadline = time.monotonic() + 60
    while not (directory / "began").exists():
        assert time.monotonic() < deadline, "\n".join(ranks.output(rank) for rank in range(3))
        time.sleep(0.02)
    began_s = time.monotonic()
    codes = ranks.wait(within_s=30)
    assert time.monotonic() - began_s < WITHIN_S
    lines = [line for rank in range(3) for line in ranks.output(rank).splitlines() if line.startswith("error: ")]
    return ranks, codes, lines


def test_a_rank_that_dies_while_an_expert_comes_is_named(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    _, codes, said = run("die", checkpoint("qwen3_moe"), draw_prompts((5, 7, 9)), tmp_path)
    assert codes == [1, -signal.SIGKILL, 1]
    (line,) = said
    assert "rank 1 has died" in line


def test_ctrl_c_while_an_expert_comes_ends_all(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    _, codes, said = run("interrupt", checkpoint("qwen3_moe"), draw_prompts((5, 7, 9)), tmp_path)
    assert codes == [1, 130, 1]
    (line,) = said
    assert "rank 1 gave up: interrupted" in line


@pytest.mark.parametrize("prompts", [(5, 7, 9)])
def test_an_expert_that_never_arrives_ends_all_and_is_named(
    prompts: tuple[int, ...], checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    _, codes, said = run("stall", checkpoint("qwen3_moe"), draw_prompts(prompts), tmp_path)
    assert codes == [1, 1, 1]
    (line,) = said
    assert "does not come from rank" in line
    assert "rank 1" in line
