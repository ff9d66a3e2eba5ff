"""`poise generate --expert-parallel`, started by torchrun on every rank: what differs from a run of one process.

Rank 0 is the command that the user sees: it reads prompts, shows progress and writes the one output. All others follow it
and stay silent, unless they are what is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from poise.errors import PoiseError, RankLostError, RanksError, UsageError
from poise.report.chrome_trace import chrome_trace_of_ranks, write_chrome_trace
from poise.units import format_s

if TYPE_CHECKING:
    from poise.engine.parallel_llm import ParallelLLM
    from poise.parallel.launch import Launch


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Ctrl-C during a run. The message is the line to print."""


CALL_OFF_S = 60.0


def this_launch() -> Launch:
    """Which rank this is. Raises RanksError where nothing like torchrun started it."""
    from poise.parallel.launch import Launch

    return Launch.from_environment(os.environ)


@contextmanager
def telling_others(launch: Launch | None) -> Iterator[None]:
    """What a rank does before it opens the model: where it fails, the others need not wait for it; where all fail alike, rank 0
    says it."""
    if launch is None:
        yield
        return
    from poise.parallel.handshake import heard_by_others

    try:
        with heard_by_others(launch):
            yield
    except RanksError as error:
        if error.is_shared and launch.rank > 0:
            sys.exit(2)
        raise


@contextmanager
def said_once(*, on_ranks: bool) -> Iterator[None]:
    """What is wrong with options is wrong on every rank that a launcher started with them: one says it."""
    try:
        yield
    except UsageError:
        if not on_ranks or "RANK" not in os.environ:
            raise
        with telling_others(this_launch()):
            raise


def call_off(launch: Launch) -> None:
    """On rank 0: lets the others go, as there is nothing to do."""
    from poise.parallel.handshake import call_off as tell

    tell(launch, timeout_s=CALL_OFF_S)


def follow(launch: Launch, open_llm: Callable[[Launch], ParallelLLM]) -> None:
    """Takes part in what rank 0 does until it is done. Raises PoiseError or Interrupted, which say which rank it is about."""
    from poise.parallel.handshake import CalledOff

    is_open = False
    try:
        with open_llm(launch) as llm:
            is_open = True
            llm.follow()
    except CalledOff:
        return
    except KeyboardInterrupt:
        if is_open:
            sys.exit(130)  # rank 0 says it
        raise Interrupted(f"rank {launch.rank}: interrupted") from None
    except RanksError as error:
        if error.is_shared:
            sys.exit(2)  # rank 0 says the same
        raise
    except RankLostError:
        raise
    except UsageError as error:
        raise UsageError(f"rank {launch.rank}: {error}") from None
    except PoiseError as error:
        raise PoiseError(f"rank {launch.rank}: {error}") from None


def closing_lines(llm: ParallelLLM, timeline: Path | None) -> list[str]:
    """What rank 0 says of all ranks when they are done. Writes their ``timeline``, where there is to be one."""
    lines = llm.figures.lines() if llm.figures is not None else []
    if llm.step_figures is not None and llm.predictor is not None:
        lines += llm.step_figures.lines(llm.predictor)
    lines += llm.balancing.table() if llm.balancing is not None else []
    if timeline is not None:
        write_chrome_trace(timeline, chrome_trace_of_ranks([each.spans for each in llm.timelines]))
        error_s = max(each.clock.error_ns for each in llm.timelines) / 1e9
        lines.append(
            f"timeline in {timeline}, ranks' clocks known to {format_s(error_s)}; open it at https://ui.perfetto.dev"
        )
    return lines
