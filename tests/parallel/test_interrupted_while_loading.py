"""Ctrl-C on a rank that waits for others, or for its own planner, before the first pass: it ends at once, all others soon."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.engine.parallel_llm import ParallelLLM
from poise.parallel.launch import Launch
from poise.parallel.rank_experts import RankExperts
from poise.parallel.watch import Patience
from poise.plan.rank_costs import RankCosts
from poise.plan.rebalance import Outcome, Planner, Proposal, Rebalance, Window
from tests.conftest import MakeCheckpoint
from tests.ranks import Ranks, start_ranks

QUICK = Patience(start_s=60.0, beat_s=0.1, silent_s=2.0, behind_s=30.0, leave_s=3.0)
FOREVER_S = 100.0


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Takes for ever to compile."""

    directory: Path
    interval: int = 4
    outcomes: tuple[Outcome | None, ...] = ()

    def start(self, curves: RankCosts | None) -> Planner:
        return self

    def propose(self, window: Window) -> Proposal | None:
        (self.directory / "0.waits").touch()
        time.sleep(FOREVER_S)
        return None


def load(launch: Launch, path: Path, directory: Path, policy: Rebalance | None) -> None:
    """Without a policy rank 1 takes for ever to read its experts; rank 0 waits for it."""
    read = RankExperts.load

    def slow_on_rank_1(self: RankExperts, *args: Any, **options: Any) -> None:
        read(self, *args, **options)
        if launch.rank == 1:
            time.sleep(FOREVER_S)
        (directory / f"{launch.rank}.waits").touch()

    if policy is None:
        RankExperts.load = slow_on_rank_1  # type: ignore[method-assign]
    ParallelLLM(path, launch, memory="2GiB", patience=QUICK, balance="static", policy=policy).close()


def interrupted(ranks: Ranks, directory: Path) -> list[int | None]:
    """Exit codes after Ctrl-C on rank 0 while it waits; all must end within eight seconds."""
    deadline = time.monotonic() + 60
    while not (directory / "0.waits").exists():
        assert time.monotonic() < deadline, "\n".join(map(ranks.output, range(2)))
        time.sleep(0.02)
    time.sleep(0.3)
    pid = ranks.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    return ranks.wait(within_s=8.0)


def test_while_another_rank_reads(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ranks = start_ranks(load, 2, tmp_path, checkpoint("qwen3_moe"), tmp_path, None)
    assert interrupted(ranks, tmp_path) == [130, 1], "the one that reads is ended by its watch"


def test_while_the_policy_is_compiled(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ranks = start_ranks(load, 2, tmp_path, checkpoint("qwen3_moe"), tmp_path, Slow(directory=tmp_path))
    assert interrupted(ranks, tmp_path) == [130, 1]
