"""Run one program as the ranks of a cluster in a box, bounded in time, under the limits of a layout.

``start`` runs a program as every rank, with the environment that `torchrun` gives (RANK, WORLD_SIZE, MASTER_ADDR, …), thread
counts pinned. What cannot be enforced here (no root, no iproute2, too few cores) fails nothing: ``missing`` says so in plain
words, and the caller marks its result. Ranks, control groups and network go when the block ends, on Ctrl-C too; if this
process is killed, the kernel kills the ranks and removes the network, and the next run removes the control groups.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

from poise.bench.cluster.layout import ClusterLayout, RankLimits
from poise.bench.cluster.network import INTERFACE, Network, NetworkError
from poise.bench.groups import ControlGroups
from poise.bench.launch import ended_within, start, text_of
from poise.units import format_bytes

_LOOPBACK = "127.0.0.1"
_PORT_IN_NAMESPACE = 29500


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """How a rank ended. ``returncode`` is negative for a signal, also for the one that a time-out sends.

    ``cpu_s``: processor time it used. ``throttled_s``: how long it was held off by its quota; None without one.
    ``peak_bytes``: the most memory, page cache included; None without a cap.
    """

    rank: int
    returncode: int
    stdout: str
    stderr: str
    elapsed_s: float
    cpu_s: float
    throttled_s: float | None
    out_of_memory: bool
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterResult:
    """How a run ended. ``timed_out``: some rank still ran when time was up, and all that did were killed."""

    ranks: tuple[RankResult, ...]
    timed_out: bool

    @property
    def has_failed(self) -> bool:
        """Whether any rank ended other than with exit code 0."""
        return any(rank.returncode != 0 for rank in self.ranks)


@dataclass(slots=True)
class _Running:
    child: subprocess.Popen[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]
    began_s: float


class Cluster:
    """``with Cluster(layout) as cluster: cluster.run([…], timeout_s=60)``, or ``start`` and ``wait`` to meddle between."""

    def __init__(self, layout: ClusterLayout) -> None:
        self.layout = layout
        self._groups: list[ControlGroups] = []
        self._network: Network | None = None
        self._running: list[_Running] = []
        self._cores: list[tuple[int, ...]] = []
        self.enforced: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def run(self, argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> ClusterResult:
        """Run ``argv`` as every rank to the end, or kill those that run after ``timeout_s``."""
        self.start(argv, env=env)
        return self.wait(timeout_s)

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start ``argv`` as every rank. ``env`` replaces the environment, to which that of the rank is added."""
        assert not self._running, "the ranks of this cluster are running"
        port = _PORT_IN_NAMESPACE if self._network is not None else _free_port()
        for rank in range(len(self.layout.ranks)):
            stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait and _close
            child = start(
                argv,
                procs=self._groups[rank].procs,
                namespace=None if self._network is None else self._network.namespaces[rank],
                cores=self._cores[rank],
                env={**(os.environ if env is None else env), **self.environment(rank, port)},
                stdout=stdout,
                stderr=stderr,
            )
            self._running.append(_Running(child=child, stdout=stdout, stderr=stderr, began_s=time.monotonic()))

    def wait(self, timeout_s: float) -> ClusterResult:
        """Until every rank has ended, at most ``timeout_s`` from now; then those that still run are killed."""
        assert self._running, "no rank was started"
        deadline = time.monotonic() + timeout_s
        ended_s: dict[int, float] = {}
        timed_out = False
        while len(ended_s) < len(self._running):
            timed_out = timed_out or time.monotonic() > deadline
            for rank, running in enumerate(self._running):
                if rank in ended_s:
                    continue
                if timed_out:
                    os.killpg(running.child.pid, signal.SIGKILL)
                if ended_within(running.child.pid, None if timed_out else 0.0):
                    ended_s[rank] = time.monotonic() - running.began_s
            time.sleep(0.01)
        results = [self._result(rank, ended_s[rank]) for rank in range(len(self._running))]
        self._stop()
        return ClusterResult(ranks=tuple(results), timed_out=timed_out)

    def ended(self) -> tuple[int, ...]:
        """The ranks that have ended by now."""
        return tuple(rank for rank, running in enumerate(self._running) if ended_within(running.child.pid, 0.0))

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a running rank and what it started."""
        os.killpg(self._running[rank].child.pid, number)

    def set_cores(self, rank: int, cores: float) -> None:
        """Change a rank's share of processor time while it runs. Only where shares are enforced."""
        reason = self._groups[rank].limit_cpu(cores)
        assert reason is None, f"a share can only be changed where it is enforced: {reason}"

    @staticmethod
    def free_port() -> int:
        """A port that nobody here uses at the moment."""
        return _free_port()

    def let_out(self, rank: int, thread: int) -> None:
        """A thread of a rank runs beside the rank's share from now on, as a copy engine does. What cannot be is ``missing``."""
        reason = self._groups[rank].let_out(thread)
        name = f"rank {rank}: copies beside its share"
        if reason is not None:
            self.missing = tuple(dict.fromkeys([*self.missing, f"{name}: {reason}"]))
        elif name not in self.enforced:
            self.enforced = (*self.enforced, name)

    @staticmethod
    def _threads(limits: RankLimits) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return dict.fromkeys(names, str(limits.threads))

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What a rank finds in its environment, besides what all have; for a result's stamp too."""
        world = str(len(self.layout.ranks))
        interface = {"GLOO_SOCKET_IFNAME": "lo" if self._network is None else INTERFACE}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": _LOOPBACK if self._network is None else self._network.address(0),
            "MASTER_PORT": str(port),
            **interface,
            **self._threads(self.layout.ranks[rank]),
        }

    def _open(self) -> None:
        enforced: list[str] = []
        missing: list[str] = []

        def note(name: str, reason: str | None) -> None:
            enforced.append(name) if reason is None else missing.append(f"{name}: {reason}")

        available = sorted(os.sched_getaffinity(0))
        for rank, limits in enumerate(self.layout.ranks):
            groups = ControlGroups()
            self._groups.append(groups)
            if limits.cores is not None:
                note(f"rank {rank}: {limits.cores:g} cores", groups.limit_cpu(limits.cores))
            if limits.memory_bytes is not None:
                name = f"rank {rank}: memory {format_bytes(limits.memory_bytes)}, page cache included"
                note(name, groups.limit_memory(limits.memory_bytes))
            self._cores.append(())
            if limits.core is not None:
                last = limits.core + limits.pinned - 1
                is_there = last < len(available)
                name = f"core {limits.core}" if limits.pinned == 1 else f"cores {limits.core} to {last}"
                note(f"rank {rank}: {name}", None if is_there else f"there are {len(available)} cores here")
                self._cores[rank] = tuple(available[limits.core : last + 1]) if is_there else ()
        if self.layout.link_bytes_per_s is not None:
            note(f"links {format_bytes(self.layout.link_bytes_per_s)}/s", self._open_network())
        self.enforced, self.missing = tuple(enforced), tuple(missing)

    def _open_network(self) -> str | None:
        assert self.layout.link_bytes_per_s is not None, "only a layout with a rate has links"
        try:
            self._network = Network(len(self.layout.ranks), bytes_per_s=self.layout.link_bytes_per_s)
        except NetworkError as error:
            return str(error)
        return None

    def _result(self, rank: int, elapsed_s: float) -> RankResult:
        running, groups = self._running[rank], self._groups[rank]
        cpu_s = _cpu_s(running.child.pid)
        os.killpg(running.child.pid, signal.SIGKILL)  # what it left behind in its session; not reaped yet
        running.child.wait()
        return RankResult(
            rank=rank,
            returncode=running.child.returncode,
            stdout=text_of(running.stdout),
            stderr=text_of(running.stderr),
            elapsed_s=elapsed_s,
            cpu_s=cpu_s,
            throttled_s=groups.throttled_s,
            out_of_memory=groups.is_out_of_memory,
            peak_bytes=groups.peak_bytes,
        )

    def _stop(self) -> None:
        """Kills ranks that were not reaped, and what they started in their sessions."""
        while self._running:
            running = self._running.pop()
            if running.child.returncode is None:
                os.killpg(running.child.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
                running.child.wait()
            running.stdout.close()
            running.stderr.close()

    def _close(self) -> None:
        """One group that cannot be removed leaves nothing else open."""
        network, self._network = self._network, None
        groups, self._groups = self._groups, []
        self._cores.clear()
        with ExitStack() as last_first:
            if network is not None:
                last_first.callback(network.close)
            for group in groups:
                last_first.callback(group.close)
            last_first.callback(self._stop)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _cpu_s(pid: int) -> float:
    """Processor time of a process that has ended and is not reaped, from ``/proc``: fields 14 and 15 of ``stat``."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
