"""Limits on child processes: what they stop, what they report, and that nothing is left behind. Real control groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poise.bench import cgroup
from poise.bench.limits import Limits, forget_cached
from poise.units import MIB

ALLOCATE = "import sys; block = bytearray(int(sys.argv[1])); print(len(block))"
READ_TWICE = """
import sys
for _ in range(2):
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
"""
HOLD_LIMITED_CHILD = """
import sys
from poise.bench.limits import Limits
with Limits(memory_bytes=256 << 20) as limits:
    limits.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
"""


def missing(limits: Limits) -> tuple[str, ...]:
    with limits:
        return limits.missing


@pytest.fixture
def memory() -> cgroup.Hierarchy:
    """The memory controller, where this process may use it."""
    reasons = missing(Limits(memory_bytes=256 * MIB))
    if reasons:
        pytest.skip(f"not permitted here: {reasons[0]}")
    hierarchy = cgroup.find_hierarchy("memory")
    assert hierarchy is not None
    return hierarchy


def groups_of(pid: int, hierarchy: cgroup.Hierarchy) -> list[Path]:
    return list(hierarchy.mount.rglob(f"poise-*-{pid}-*"))


def wait_until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def start_holder(hierarchy: cgroup.Hierarchy) -> tuple[subprocess.Popen[bytes], Path, int]:
    """A process that runs a sleeping child under a limit; returns it, its group and the child's id."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LIMITED_CHILD], stderr=subprocess.DEVNULL)
    wait_until(lambda: groups_of(holder.pid, hierarchy))
    (group,) = groups_of(holder.pid, hierarchy)
    wait_until(lambda: (group / "cgroup.procs").read_text().strip())
    return holder, group, int((group / "cgroup.procs").read_text())


def test_a_child_above_its_memory_is_killed_and_one_below_lives(memory: cgroup.Hierarchy) -> None:
    with Limits(memory_bytes=128 * MIB) as limits:
        above = limits.run([sys.executable, "-c", ALLOCATE, str(256 * MIB)])
        below = limits.run([sys.executable, "-c", ALLOCATE, str(64 * MIB)])
        assert len(limits.enforced) == 1
        assert "128 MiB" in limits.enforced[0]
    assert above.out_of_memory
    assert above.returncode == -signal.SIGKILL
    assert not below.out_of_memory
    assert (below.returncode, below.stdout.strip()) == (0, str(64 * MIB))
    assert below.peak_bytes is not None
    assert 64 * MIB < below.peak_bytes < 128 * MIB, "the peak of the first run must not count for the second"
    assert groups_of(os.getpid(), memory) == []


def test_a_file_larger_than_the_memory_is_read_from_disk_every_time(memory: cgroup.Hierarchy, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 96)
    forget_cached(tmp_path)
    with Limits(memory_bytes=32 * MIB) as limits:
        result = limits.run([sys.executable, "-c", READ_TWICE, str(path)])
    if not result.read_bytes:
        pytest.skip("storage reads are not counted here, or temporary files are in memory")
    assert result.read_bytes >= 0.95 * 2 * 96 * MIB


def test_disk_reads_are_slowed_to_the_limit(tmp_path: Path) -> None:
    reasons = missing(Limits(read_bytes_per_s=64 * MIB, path=tmp_path))
    if reasons:
        pytest.skip(f"not permitted here: {reasons[0]}")
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 32)
    with Limits(read_bytes_per_s=64 * MIB, path=tmp_path) as limits:
        forget_cached(path)
        result = limits.run([sys.executable, "-c", READ_TWICE, str(path)])
    assert result.returncode == 0
    assert result.elapsed_s > 0.4, "32 MiB at 64 MiB/s take half a second"


def test_a_child_that_takes_too_long_is_killed_with_its_children() -> None:
    with Limits() as limits:
        result = limits.run(["sh", "-c", "sleep 60 & echo $!; wait"], timeout_s=0.5)
    assert result.timed_out
    assert result.elapsed_s < 10
    wait_until(lambda: is_dead(int(result.stdout)))


def test_ctrl_c_leaves_no_child_and_no_group(memory: cgroup.Hierarchy) -> None:
    holder, group, child = start_holder(memory)
    holder.send_signal(signal.SIGINT)
    holder.wait(timeout=10)
    assert not group.exists()
    assert is_dead(child)


def test_a_killed_run_takes_its_child_along_and_the_next_run_removes_its_group(memory: cgroup.Hierarchy) -> None:
    holder, group, child = start_holder(memory)
    holder.kill()
    holder.wait(timeout=10)
    wait_until(lambda: is_dead(child))
    assert group.exists()
    with Limits(memory_bytes=256 * MIB):
        assert not group.exists()


def test_without_privilege_the_child_runs_and_the_reason_is_given() -> None:
    script = (
        "import os\n"
        "from poise.bench.limits import Limits\n"
        "limits, user = Limits(memory_bytes=64 << 20), os.geteuid()\n"
        "os.seteuid(user or 65534)\n"
        "with limits:\n"
        "    os.seteuid(user)\n"
        "    print(limits.run(['/bin/sh', '-c', 'echo ran']).stdout.strip(), limits.enforced, *limits.missing)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    if "memory" not in done.stdout.partition("()")[2]:
        pytest.skip("an unprivileged user may make control groups here")
    assert done.stdout.startswith("ran () memory 64 MiB, page cache included: ")


def test_a_program_that_does_not_exist_is_named() -> None:
    with Limits() as limits:
        result = limits.run(["no-such-program"])
    assert result.returncode != 0
    assert "no-such-program" in result.stderr


def test_output_and_environment_pass_through() -> None:
    with Limits() as limits:
        result = limits.run(["sh", "-c", "echo $GREETING; echo oops >&2; exit 3"], env=os.environ | {"GREETING": "hi"})
    assert (result.stdout, result.stderr, result.returncode) == ("hi\n", "oops\n", 3)
    assert result.peak_bytes is None
