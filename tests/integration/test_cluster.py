"""The cluster in a box with real namespaces, quotas and ranks: what it limits, and that nothing is left behind."""

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
from poise.bench.cluster.cluster import Cluster
from poise.bench.cluster.exchange import measure
from poise.bench.cluster.layout import GBIT_PER_S, ClusterLayout, RankLimits, four_unequal_ranks, two_ranks
from poise.bench.cluster.network import Network, NetworkError
from poise.units import MIB

SPIN = """
import time
end = time.monotonic() + 1.0
while time.monotonic() < end:
    pass
"""
ENVIRONMENT = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS')))"
INTERFACES = "import socket; print(*(name for _, name in socket.if_nameindex()))"
HOLD_RANKS = """
import sys
from poise.bench.cluster.cluster import Cluster
from poise.bench.cluster.layout import GBIT_PER_S, ClusterLayout, RankLimits
layout = ClusterLayout(name="held", ranks=(RankLimits(cores=0.5),) * 2, link_bytes_per_s=GBIT_PER_S)
with Cluster(layout) as cluster:
    cluster.start([sys.executable, "-c", "import time; time.sleep(60)"])
    print(*(running.child.pid for running in cluster._running), flush=True)
    cluster.wait(60)
"""


def open_or_skip(layout: ClusterLayout) -> Cluster:
    """A cluster whose limits can all be enforced here; else the test is skipped, with the reason."""
    with Cluster(layout) as cluster:
        if cluster.missing:
            pytest.skip(f"not permitted here: {cluster.missing[0]}")
    return Cluster(layout)


def wait_until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def groups_of(pid: int) -> list[Path]:
    return list(Path("/sys/fs/cgroup").rglob(f"poise-*-{pid}-*"))


def network_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def hold() -> tuple[subprocess.Popen[str], list[int]]:
    """A harness in a process of its own, and its ranks."""
    open_or_skip(ClusterLayout(name="held", ranks=(RankLimits(cores=0.5),) * 2, link_bytes_per_s=GBIT_PER_S))
    holder = subprocess.Popen([sys.executable, "-c", HOLD_RANKS], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        pids = [int(pid) for pid in holder.stdout.readline().split()]
    assert len(pids) == 2
    wait_until(lambda: network_of(os.getpid()) not in map(network_of, pids))
    return holder, pids


def test_ranks_find_their_place_and_their_thread_count() -> None:
    layout = ClusterLayout(name="two", ranks=(RankLimits(threads=1), RankLimits(threads=2)))
    with Cluster(layout) as cluster:
        result = cluster.run([sys.executable, "-c", ENVIRONMENT], timeout_s=20)
    assert [rank.stdout.strip() for rank in result.ranks] == ["0 2 127.0.0.1 1", "1 2 127.0.0.1 2"]
    assert not result.has_failed


def test_a_rank_may_have_several_cores_of_its_own() -> None:
    here = sorted(os.sched_getaffinity(0))
    layout = ClusterLayout(
        name="one", ranks=(RankLimits(core=0, pinned=len(here)), RankLimits(core=1, pinned=len(here)))
    )
    with Cluster(layout) as cluster:
        assert cluster.missing == (f"rank 1: cores 1 to {len(here)}: there are {len(here)} cores here",)
        result = cluster.run([sys.executable, "-c", "import os; print(*sorted(os.sched_getaffinity(0)))"], timeout_s=20)
    assert result.ranks[0].stdout.split() == [str(core) for core in here]


def test_ranks_behind_links_see_only_their_own_network() -> None:
    with open_or_skip(two_ranks().with_link(GBIT_PER_S)) as cluster:
        result = cluster.run([sys.executable, "-c", INTERFACES], timeout_s=20)
    assert [rank.stdout.split() for rank in result.ranks] == [["lo", "link0"]] * 2, result.ranks[0].stderr


def test_the_network_of_the_machine_is_not_touched() -> None:
    before = os.listdir("/sys/class/net")
    try:
        network = Network(3, bytes_per_s=GBIT_PER_S)
    except NetworkError as error:
        pytest.skip(f"not permitted here: {error}")
    try:
        assert os.listdir("/sys/class/net") == before
    finally:
        network.close()


def test_a_share_of_processor_time_holds_and_can_be_cut_while_ranks_run() -> None:
    layout = ClusterLayout(name="unequal", ranks=(RankLimits(cores=0.5), RankLimits(cores=0.2), RankLimits(cores=0.5)))
    with open_or_skip(layout) as cluster:
        cluster.start([sys.executable, "-c", SPIN])
        cluster.set_cores(2, 0.2)
        result = cluster.wait(20)
    used = [rank.cpu_s / rank.elapsed_s for rank in result.ranks]
    assert used[0] < 0.6
    assert used[1] < 0.3
    assert used[2] < 0.35, "cut soon after it began"
    assert all(rank.throttled_s for rank in result.ranks)


def test_the_unequal_layout_leaves_room_on_two_cores() -> None:
    shares = [rank.cores or 0.0 for rank in four_unequal_ranks().ranks]
    assert sum(shares) <= 1.4
    assert max(shares) / min(shares) > 1.5


def test_a_rank_above_its_memory_is_killed_and_the_other_lives() -> None:
    layout = ClusterLayout(name="small", ranks=(RankLimits(memory_bytes=64 * MIB), RankLimits(memory_bytes=512 * MIB)))
    with open_or_skip(layout) as cluster:
        result = cluster.run([sys.executable, "-c", f"block = bytearray({128 * MIB})"], timeout_s=20)
    assert [rank.out_of_memory for rank in result.ranks] == [True, False]
    assert [rank.returncode for rank in result.ranks] == [-signal.SIGKILL, 0]
    assert (result.ranks[1].peak_bytes or 0) >= 128 * MIB


def test_a_limited_link_is_slower_than_its_rate_allows_at_best_and_not_much() -> None:
    layout = two_ranks().with_link(GBIT_PER_S)
    open_or_skip(layout)
    rows, enforced, missing = measure(layout, sizes_bytes=(4 * MIB,), repeats=3, socket_s=0.2)
    assert not missing
    assert "links 119 MiB/s" in enforced
    share = rows[0]["limit_frac"]
    assert isinstance(share, float)
    assert 0.3 < share < 1.15, "4 MiB at 1 Gbit/s; the bucket lets a little through at once"


def test_ranks_that_take_too_long_are_killed() -> None:
    with Cluster(two_ranks()) as cluster:
        result = cluster.run(["sh", "-c", "[ $RANK = 0 ] || sleep 60"], timeout_s=1.0)
    assert result.timed_out
    assert [rank.returncode for rank in result.ranks] == [0, -signal.SIGKILL]
    assert result.ranks[1].elapsed_s < 10


def test_a_core_that_is_not_there_is_said_and_the_ranks_run() -> None:
    layout = ClusterLayout(name="wide", ranks=(RankLimits(core=4096),))
    with Cluster(layout) as cluster:
        result = cluster.run(["true"], timeout_s=20)
    assert not result.has_failed
    assert cluster.enforced == ()
    assert cluster.missing == (f"rank 0: core 4096: there are {len(os.sched_getaffinity(0))} cores here",)


def test_without_iproute2_the_ranks_run_over_loopback_and_the_remedy_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with Cluster(two_ranks().with_link(GBIT_PER_S)) as cluster:
        result = cluster.run([sys.executable, "-c", ENVIRONMENT], timeout_s=20)
    assert "127.0.0.1" in result.ranks[0].stdout
    assert "apt-get install iproute2" in cluster.missing[-1]
    assert cluster.missing[-1].startswith("links ")


def test_without_root_one_line_says_so() -> None:
    script = (
        "import os\n"
        "from poise.bench.cluster.network import Network, NetworkError\n"
        "if os.geteuid() == 0:\n    os.seteuid(65534)\n"
        "try:\n    Network(2, bytes_per_s=1000)\n"
        "except NetworkError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    if "iproute2" in done.stdout:
        pytest.skip("iproute2 is not installed")
    assert done.stdout == "network namespaces need root; run as root\n", done.stderr


def test_a_group_that_cannot_be_removed_leaves_the_others_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = open_or_skip(ClusterLayout(name="held", ranks=(RankLimits(cores=0.5),) * 3))
    remove, asked = cgroup.remove_group, []

    def refuse_the_last(group: Path) -> None:
        asked.append(group)
        remove(group)
        if len(asked) == 1:
            raise OSError("busy")

    cluster.__enter__()
    assert len(groups_of(os.getpid())) == 3
    monkeypatch.setattr(cgroup, "remove_group", refuse_the_last)
    with pytest.raises(OSError, match="busy"):
        cluster.__exit__(None, None, None)
    assert len(asked) == 3
    assert groups_of(os.getpid()) == []


def test_ctrl_c_leaves_no_rank_and_no_group() -> None:
    holder, pids = hold()
    holder.send_signal(signal.SIGINT)
    holder.wait(timeout=10)
    assert all(is_dead(pid) for pid in pids)
    assert groups_of(holder.pid) == []


def test_a_killed_harness_takes_its_ranks_along_and_the_next_removes_its_groups() -> None:
    holder, pids = hold()
    namespaces = set(map(network_of, pids))
    assert len(namespaces) == 2
    holder.kill()
    holder.wait(timeout=10)
    wait_until(lambda: all(is_dead(pid) for pid in pids))
    assert groups_of(holder.pid), "nobody could remove them"
    with Cluster(ClusterLayout(name="next", ranks=(RankLimits(cores=0.5),))):
        assert groups_of(holder.pid) == []
    assert not namespaces & set(held_namespaces()), "some process still holds the network of the killed harness"


def held_namespaces() -> list[str]:
    """The network namespaces that any process is in or holds open."""
    held = []
    for link in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("net:"):
            held.append(target)
    return held
