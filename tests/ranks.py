"""Ranks of an expert-parallel job as processes on this machine, for tests: real Gloo over loopback.

A server process imports the package once and forks the ranks, so that starting one costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from poise.errors import PoiseError, RankLostError, UsageError
from poise.parallel.launch import Launch

PRELOAD = ["tests.ranks", "poise.engine.parallel_llm"]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Running ranks. Each ends with exit code 0, or as a command would: 1 for a lost rank, 2 for bad input."""

    processes: list[BaseProcess]
    directory: Path

    def wait(self, within_s: float = 60.0) -> list[int | None]:
        """Exit codes, negative for signals; a rank that does not end in time is killed and has None."""
        deadline = time.monotonic() + within_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes

    def results(self, within_s: float = 60.0) -> list[Any]:
        """What each rank returned; fails with their output unless all ended well."""
        codes = self.wait(within_s)
        assert codes == [0] * len(self.processes), f"exit codes {codes}\n" + "\n".join(
            map(self.output, range(len(codes)))
        )
        return [pickle.loads((self.directory / f"{rank}.pickle").read_bytes()) for rank in range(len(codes))]

    def output(self, rank: int) -> str:
        """What a rank wrote to stdout and stderr."""
        return (self.directory / f"{rank}.log").read_text()


def start_ranks(target: Callable[..., Any], num_ranks: int, directory: Path, *arguments: Any) -> Ranks:
    """Starts ``target(launch, *arguments)`` on every rank; ``target`` is a function of a module."""
    directory.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(num_ranks):
        launch = Launch(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=rank,
            local_ranks=num_ranks,
            host="127.0.0.1",
            port=port,
            attempt=0,
            keeps_store=rank == 0,
        )
        process = context.Process(target=_run, args=(target, launch, directory, arguments), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes=processes, directory=directory)


def _run(target: Callable[..., Any], launch: Launch, directory: Path, arguments: tuple[Any, ...]) -> None:
    log = os.open(directory / f"{launch.rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
    try:
        result = target(launch, *arguments)
    except PoiseError as error:
        if not isinstance(error, RankLostError) or error.is_speaker:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    (directory / f"{launch.rank}.pickle").write_bytes(pickle.dumps(result))
