"""`poise generate --timeline`: a file that Perfetto opens, and a line that says where the time went."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import poise

MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"


def test_a_timeline_is_written_whole_and_its_bubbles_are_named(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    arguments = [
        "generate",
        str(MODEL),
        "def main():",
        "--max-tokens",
        "12",
        "--memory",
        "100MiB",
        "--timeline",
        str(file),
    ]
    run = subprocess.run([sys.executable, "-m", "poise", *arguments], capture_output=True, text=True, check=True)
    trace = json.loads(file.read_text())
    events, facts = trace["traceEvents"], trace["otherData"]
    assert facts["generated_tokens"] == 12
    for phase in ("prefill", "decode"):
        ahead = facts[f"{phase}_ahead"]
        assert 0 <= ahead["hottest"] <= ahead["used"] <= ahead["named"]
        said = f"read ahead in {phase}: {ahead['named']:,} experts, {ahead['used_frac'] or 0:.0%} used"
        assert (said in run.stderr) == (ahead["named"] > 0)
    assert {"attention", "expert", "read"} <= {event["name"] for event in events}
    assert f"timeline in {file}" in run.stderr
    assert "disk busy" in run.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_run_leaves_its_timeline(tmp_path: Path) -> None:
    output, file = tmp_path / "answers.jsonl", tmp_path / "timeline.json"
    prompts = tmp_path / "in.jsonl"
    lines = [{"prompt": "def main():", "max_tokens": tokens} for tokens in (400, 400, 4)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", str(MODEL), "--prompts", str(prompts), "--output", str(output), "--ignore-eos"]
    arguments += ["--memory", "100MiB", "--timeline", str(file)]
    run = subprocess.Popen([sys.executable, "-m", "poise", *arguments], stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "answers.jsonl.partial", time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert f"timeline in {file}" in said
    trace = json.loads(file.read_text())
    assert 4 <= trace["otherData"]["generated_tokens"] < 804
    assert {"attention", "expert"} <= {event["name"] for event in trace["traceEvents"]}


def test_where_nothing_is_left_to_run_no_timeline_is_promised(tmp_path: Path) -> None:
    output, file = tmp_path / "answers.jsonl", tmp_path / "timeline.json"
    arguments = [
        "generate",
        str(MODEL),
        "def main():",
        "--max-tokens",
        "2",
        "--memory",
        "1GiB",
        "--output",
        str(output),
    ]
    argv = [sys.executable, "-m", "poise", *arguments]
    subprocess.run(argv, capture_output=True, check=True)
    again = subprocess.run(
        [*argv, "--resume", "--timeline", str(file)], capture_output=True, text=True, check=True
    ).stderr.splitlines()
    assert again == [
        f"poise: all done: the 1 results are in {output}",
        f"poise: --timeline: nothing was left to run, so {file} is not written",
    ]
    assert not file.exists()


def test_a_timeline_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    arguments = ["generate", str(tmp_path / "no-model"), "a", "--timeline", str(tmp_path / "absent" / "t.json")]
    run = subprocess.run([sys.executable, "-m", "poise", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "absent does not exist" in line


def test_a_machine_file_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    arguments = ["generate", str(MODEL), "a", "--machine", str(tmp_path / "machine.json")]
    run = subprocess.run([sys.executable, "-m", "poise", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "machine.json cannot be read" in run.stderr
    assert "Traceback" not in run.stderr
