"""What ranks other than 0 say: nothing that rank 0 says too, and all that only they know."""

from __future__ import annotations

import pytest

from poise.cli.expert_parallel import Interrupted, follow
from poise.engine.parallel_llm import ParallelLLM
from poise.errors import RanksError, UsageError
from poise.parallel.handshake import CalledOff
from poise.parallel.launch import Launch

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


def follow_into(error: BaseException) -> None:
    def open_llm(launch: Launch) -> ParallelLLM:
        raise error

    follow(Launch.from_environment(ENVIRONMENT), open_llm)


def test_where_ranks_differ_rank_0_speaks() -> None:
    with pytest.raises(SystemExit) as stop:
        follow_into(RanksError("rank 1 has torch 2.11, rank 0 has 2.13", is_shared=True))
    assert stop.value.code == 2


@pytest.mark.parametrize("message", ["rank 1 cannot reach the ranks' meeting point h:29500", "rank 0 has not joined"])
def test_what_rank_0_cannot_know_is_said(message: str) -> None:
    with pytest.raises(RanksError, match=message):
        follow_into(RanksError(message))


def test_what_is_wrong_here_is_said_with_the_rank() -> None:
    with pytest.raises(UsageError, match="rank 1: no such model directory"):
        follow_into(UsageError("no such model directory"))


def test_ctrl_c_before_it_has_joined_is_said() -> None:
    with pytest.raises(Interrupted, match="rank 1: interrupted"):
        follow_into(KeyboardInterrupt())


def test_nothing_to_do_is_no_error() -> None:
    follow_into(CalledOff())
