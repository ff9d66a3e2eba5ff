"""Ranks meet, compare what they run, and end together: real processes over loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from poise.errors import RanksError
from poise.parallel.carrier import GLOO_THROUGH_HOST
from poise.parallel.group import RankGroup
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from tests.ranks import Ranks, start_ranks

FACTS = {"checkpoint": "abc", "torch": "2.13.0"}
QUICK = Patience(start_s=20.0, beat_s=0.1, silent_s=1.5, behind_s=2.0, leave_s=2.0)


def exchange_forever(launch: Launch, directory: Path, acts: dict[int, str], patience: Patience = QUICK) -> None:
    """Exchanges without end; a rank with an act does it after its tenth exchange."""
    with RankGroup(launch, FACTS, patience=patience) as group:
        mine, came = torch.full((group.num_ranks,), float(group.rank)), torch.empty(group.num_ranks)
        for number in range(1_000_000):
            group.all_to_all(came, mine, [1] * group.num_ranks, [1] * group.num_ranks)
            assert came.tolist() == list(range(group.num_ranks))
            if number == 10:
                (directory / f"{group.rank}.started").touch()
                act = acts.get(group.rank)
                if act == "fail":
                    raise ValueError("the disk is on fire")
                if act == "sleep":
                    time.sleep(60)
                if act == "leave":
                    os._exit(3)


def run_to_the_end(
    tmp_path: Path,
    acts: dict[int, str],
    disturb: Callable[[Ranks], None] | None = None,
    patience: Patience = QUICK,
) -> tuple[Ranks, list[int | None]]:
    """Three ranks, one of which ends the job; returns their exit codes. The job must end within ten seconds of it."""
    ranks = start_ranks(exchange_forever, 3, tmp_path, tmp_path, acts, patience)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.started"))) < 3:
        assert time.monotonic() < deadline, "\n".join(ranks.output(rank) for rank in range(3))
        time.sleep(0.02)
    if disturb is not None:
        disturb(ranks)
    return ranks, ranks.wait(within_s=15)


def said(ranks: Ranks) -> list[str]:
    """The lines that users see, from all ranks."""
    return [line for rank in range(3) for line in ranks.output(rank).splitlines() if line.startswith("error: ")]


def send(rank: int, number: int) -> Callable[[Ranks], None]:
    def disturb(ranks: Ranks) -> None:
        pid = ranks.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    return disturb


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_rank_that_is_killed_ends_all_with_one_message_that_names_it(rank: int, tmp_path: Path) -> None:
    """Rank 0 keeps the store: the others notice when it is gone."""
    ranks, codes = run_to_the_end(tmp_path, {}, send(rank, signal.SIGKILL))
    assert codes[rank] == -signal.SIGKILL
    assert [code for other, code in enumerate(codes) if other != rank] == [1, 1]
    if rank == 0:
        assert all("meeting point is gone" in line or "rank 0 has died" in line for line in said(ranks))
        assert said(ranks)
    else:
        (line,) = said(ranks)
        assert "rank 2 has died or is frozen" in line


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_ends_when_it_wakes(tmp_path: Path) -> None:
    def freeze_for_a_while(ranks: Ranks) -> None:
        send(1, signal.SIGSTOP)(ranks)
        time.sleep(2.5)
        send(1, signal.SIGCONT)(ranks)

    ranks, codes = run_to_the_end(tmp_path, {}, freeze_for_a_while)
    assert codes == [1, 1, 1]
    (line,) = said(ranks)
    assert "rank 1 has died or is frozen: no sign of life" in line


def test_a_rank_that_lives_but_does_not_come_is_named_and_ended(tmp_path: Path) -> None:
    ranks, codes = run_to_the_end(tmp_path, {1: "sleep"})
    assert codes == [1, 1, 1]
    (line,) = said(ranks)
    assert "rank 1 stalled" in line
    assert "exchange 12" in line


def test_the_reason_of_a_rank_that_gives_up_reaches_the_others(tmp_path: Path) -> None:
    ranks, codes = run_to_the_end(tmp_path, {2: "fail"})
    assert codes == [1, 1, 1]
    assert "ValueError: the disk is on fire" in ranks.output(2)
    assert said(ranks) == [], "rank 2 has its own traceback, and the others need not repeat it"


def test_ctrl_c_on_one_rank_ends_all(tmp_path: Path) -> None:
    ranks, codes = run_to_the_end(tmp_path, {}, send(1, signal.SIGINT))
    assert codes == [1, 130, 1]
    assert said(ranks) == ["error: rank 1 gave up: interrupted; all ranks end"]
    assert "interrupted" in ranks.output(0), "rank 0 is the command that the user sees"


@pytest.mark.parametrize("told", [(1,), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_a_rank_that_is_told_to_end_says_so_and_all_end(told: tuple[int, ...], tmp_path: Path) -> None:
    """SIGTERM while nobody is lost: to one process, or to all of a job, as its launcher or Slurm does."""

    def tell(ranks: Ranks) -> None:
        for rank in told:
            send(rank, signal.SIGTERM)(ranks)

    ranks, codes = run_to_the_end(tmp_path, {}, tell, replace(QUICK, behind_s=8.0))
    assert codes == [1, 1, 1]
    (line,) = said(ranks)
    assert line in {f"error: rank {rank} was told to end (SIGTERM); all ranks end" for rank in told}


@pytest.mark.slow
def test_when_a_launcher_ends_the_others_the_message_still_names_who_died(tmp_path: Path) -> None:
    """As torchrun does: SIGTERM to all that are left as soon as one has died."""

    def kill_one_and_end_the_others(ranks: Ranks) -> None:
        send(1, signal.SIGKILL)(ranks)
        ranks.processes[1].join()
        send(0, signal.SIGTERM)(ranks)
        send(2, signal.SIGTERM)(ranks)

    ranks, codes = run_to_the_end(tmp_path, {}, kill_one_and_end_the_others)
    assert codes == [1, -signal.SIGKILL, 1]
    (line,) = said(ranks)
    assert "rank 1 has died" in line


def join(launch: Launch, facts_R: list[dict[str, str]], absent: int | None, start_s: float) -> int:
    if launch.rank == absent:
        return -1
    with RankGroup(launch, facts_R[launch.rank], patience=replace(QUICK, start_s=start_s)) as group:
        return int(group.all_gather(torch.tensor([group.rank])).sum())


def test_ranks_that_agree_become_a_group(tmp_path: Path) -> None:
    assert start_ranks(join, 2, tmp_path, [FACTS] * 2, None, 20.0).results() == [1, 1]


def exchange_through_host(launch: Launch) -> tuple[list[int], list[int], list[int]]:
    """As ranks do that share a GPU: all goes through other memory."""
    with RankGroup(launch, FACTS, patience=QUICK, carrier=GLOO_THROUGH_HOST) as group:
        mine, came = torch.tensor([10 * group.rank, 10 * group.rank + 1]), torch.zeros(2, dtype=torch.int64)
        group.all_to_all(came, mine, [1, 1], [1, 1])
        channel, moved = group.open_channel(), torch.zeros(2, dtype=torch.int64)
        channel.send(mine, 1) if group.rank == 0 else channel.receive(moved, 0)
        return came.tolist(), group.all_gather(mine)[:, 1].tolist(), moved.tolist()


def test_exchanges_through_other_memory_bring_the_same(tmp_path: Path) -> None:
    first, second = start_ranks(exchange_through_host, 2, tmp_path).results()
    assert first == ([0, 10], [1, 11], [0, 0])
    assert second == ([1, 11], [1, 11], [0, 1])


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("checkpoint", "def", "give every rank the same MODEL"),
        ("torch", "2.11.0", "install one version on every machine"),
        ("balance", "vibe", "give every rank the same options"),
    ],
)
def test_a_rank_that_runs_something_else_is_refused_by_all(name: str, value: str, remedy: str, tmp_path: Path) -> None:
    ranks = start_ranks(join, 3, tmp_path, [FACTS, FACTS, {**FACTS, name: value}], None, 20.0)
    assert ranks.wait() == [2, 2, 2]
    assert set(said(ranks)) == {f"error: rank 2 has {name} {value}, rank 0 has {FACTS.get(name)}; {remedy}"}


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    ranks = start_ranks(join, 3, tmp_path, [FACTS] * 3, 2, 1.5)
    assert ranks.wait() == [2, 2, 0]
    assert set(said(ranks)) == {"error: rank 2 has not joined within 1.5 s; start all ranks, on every machine"}


def test_how_many_ranks_share_a_host_is_known_where_the_launcher_says_it() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    assert Launch.from_environment(environment).local_ranks == 1
    assert Launch.from_environment({**environment, "LOCAL_WORLD_SIZE": "2"}).local_ranks == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "x"}, "RANK is 'x'; it is a whole number"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4; a rank is 0 to 3"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ],
)
def test_an_environment_that_no_launcher_made_is_refused(changes: dict[str, str | None], message: str) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "29500", **changes}
    with pytest.raises(RanksError, match=message):
        Launch.from_environment({name: value for name, value in environment.items() if value is not None})
