"""Start a child where it is to run: it joins its control groups, cores and network before it becomes the program.

So nothing that it does escapes a limit. The kernel kills it if this process dies.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_POLL_S = 0.02
_LAUNCHER = """
import ctypes, os, signal, sys
parent, namespace, cores, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
groups, argv = sys.argv[5 : 5 + count], sys.argv[5 + count :]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
if os.getppid() != parent:
    sys.exit(1)
if namespace != "-":
    if libc.setns(int(namespace), 0x40000000):  # CLONE_NEWNET
        sys.exit(f"cannot enter the network namespace: {os.strerror(ctypes.get_errno())}")
    os.close(int(namespace))
if cores != "-":
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
for group in groups:
    with open(group, "w") as procs:
        procs.write(str(os.getpid()))
try:
    os.execvp(argv[0], argv)
except OSError as error:
    sys.exit(f"cannot run {argv[0]}: {error.strerror}")
"""


def start(
    argv: Sequence[str],
    *,
    procs: Sequence[Path] = (),
    namespace: int | None = None,
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in a session of its own.

    ``procs``: the files of control groups to join. ``namespace``: descriptor of a network namespace. ``cores``: those it may
    run on; none: any. ``env`` replaces the environment.
    """
    place = ["-" if namespace is None else str(namespace), ",".join(map(str, cores)) or "-"]
    launcher = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        _LAUNCHER,
        str(os.getpid()),
        *place,
        str(len(procs)),
        *map(str, procs),
    ]
    return subprocess.Popen(
        [*launcher, *argv],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=env,
        start_new_session=True,
        pass_fds=() if namespace is None else (namespace,),
    )


def ended_within(pid: int, timeout_s: float | None) -> bool:
    """Wait for ``pid`` without reaping it: its counters are still to be read."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def text_of(stream: IO[bytes]) -> str:
    """All that was written to a child's output."""
    stream.seek(0)
    return stream.read().decode(errors="replace")
