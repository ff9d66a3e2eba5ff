"""`torchrun -m poise generate --expert-parallel` as users run it: one output, and one message on failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from poise.bench.cluster.cluster import Cluster
from poise.bench.cluster.layout import GBIT_PER_S, two_ranks
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.ranks import free_port


def torchrun(ranks: int, arguments: Sequence[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "--master-port", str(free_port()), "-m", "poise", *arguments]


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, killed with all it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def prompt_file(draw_prompts: DrawPrompts, tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt_token_ids": ids}) for ids in draw_prompts((9, 4, 21, 13, 6))]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def results(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of a launcher's ranks, once they have started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = {}
    for child in children.read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry[5:] for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = int(child)
    return found


def test_two_ranks_write_the_one_output_that_one_process_writes(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    asked = ["generate", str(path), "--prompts", str(prompt_file), "--max-tokens", "5", "--ignore-eos"]
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    subprocess.run(
        [sys.executable, "-m", "poise", *asked, "--memory", "1GiB", "--output", str(alone)], check=True, timeout=120
    )
    timeline = tmp_path / "timeline.json"
    parallel = [*asked, "--memory", "1GiB", "--output", str(shared), "--expert-parallel", "--balance", "vibe", "--json"]
    run = subprocess.run(
        torchrun(2, [*parallel, "--timeline", str(timeline)]), capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert results(shared) == results(alone)
    assert run.stderr.count("25 tokens in") == 1, "one summary, of all ranks together"
    assert run.stderr.count("experts, most of a rank over the mean: tokens") == 1
    assert "expert hits" not in run.stderr, "all experts are in memory"
    assert "of a budget of 1 GiB on rank 0" in run.stderr
    document = json.loads(run.stdout)
    assert document["plan"]["balance"] == "vibe"
    assert {"hit_frac", "bytes_read", "prefill_ahead"}.isdisjoint(document["stats"])
    facts = document["stats"]["parallel"]
    assert facts["rebalances"] == [], "so few passes are no profile"
    assert facts["passes"] == len(facts["steps"]["pass_s"]) >= 5
    assert all(len(facts["ranks"][name]) == 2 for name in ("expert_s", "waited_s", "sent_bytes"))
    events = json.loads(timeline.read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(processes.values()) == ["rank 0", "rank 1"]
    for pid in processes:
        assert {"attention", "expert", "dispatch", "combine", "wait: last rank"} <= {
            event["name"] for event in events if event["pid"] == pid
        }
    assert f"timeline in {timeline}, ranks' clocks known to" in run.stderr


@pytest.mark.slow
def test_resuming_a_finished_run_lets_the_other_ranks_go(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    asked = ["generate", str(checkpoint("qwen3_moe")), "--prompts", str(prompt_file), "--max-tokens", "5"]
    asked += ["--memory", "1GiB", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "poise", *asked], check=True, timeout=120)
    parallel = [*asked, "--expert-parallel"]
    again = subprocess.run(
        torchrun(2, [*parallel, "--resume"]), capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("all done") == 1


def test_a_rank_that_is_killed_ends_the_job_with_a_message_that_names_it(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["generate", str(checkpoint("qwen3_moe")), "--prompts", str(prompt_file), "--max-tokens", "200"]
    arguments += ["--ignore-eos", "--memory", "1GiB", "--output", str(output), "--expert-parallel"]
    with running(torchrun(2, arguments)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("poise: balance:"):
                assert line == "poise: balance: probe (auto: replicas of hot experts come for each step)\n"
            if "ranks 2" in line:  # the header: all have loaded
                break
        time.sleep(0.3)
        began_s = time.monotonic()
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began_s < 30
    said = [line for line in errors.splitlines() if line.startswith("poise: ")]
    assert len(said) == 1
    assert "rank 1 has died" in said[0]
    assert not output.exists()


def test_without_a_launcher_it_is_refused_in_one_line(prompt_file: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "poise", "generate", "m", "--prompts", str(prompt_file), "--expert-parallel"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line == (
        "poise: RANK is not set; it is a whole number; start ranks with: torchrun --nproc-per-node RANKS -m poise ..."
    )


@pytest.mark.parametrize("option", [("--save-table", "t.safetensors"), ("--correlation-table", "t.safetensors")])
def test_what_ranks_would_not_heed_is_refused_in_one_line(option: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "poise", "generate", "model", "x", "--expert-parallel", *option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{option[0]}" in done.stderr
    assert "--expert-parallel" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_hosts_write_the_one_output_that_one_process_writes(
    checkpoint: MakeCheckpoint, prompt_file: Path, tmp_path: Path
) -> None:
    """Ranks in networks of their own, each with an address of its own: nothing but their link joins them."""
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    asked = [sys.executable, "-m", "poise", "generate", str(checkpoint("qwen3_moe")), "--prompts", str(prompt_file)]
    asked += ["--max-tokens", "5", "--ignore-eos", "--memory", "1GiB"]
    subprocess.run([*asked, "--output", str(alone)], check=True, timeout=120)
    with Cluster(two_ranks().with_link(GBIT_PER_S)) as cluster:
        if cluster.missing:
            pytest.skip(f"not permitted here: {cluster.missing[0]}")
        result = cluster.run([*asked, "--output", str(shared), "--expert-parallel", "--balance", "eplb"], timeout_s=120)
    assert not result.has_failed, [rank.stderr for rank in result.ranks]
    assert results(shared) == results(alone)
