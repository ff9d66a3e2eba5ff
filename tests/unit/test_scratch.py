"""Directories of benchmarks: gone when they are done, and when they were killed, with the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from poise.bench import scratch
from poise.bench.scratch import Scratch

HOLD = """
import sys
from poise.bench.scratch import Scratch
with Scratch() as scratch:
    (scratch.path / "large").write_text("x")
    print(scratch.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_FRESH_S", 0.0)


def test_it_goes_when_the_block_ends() -> None:
    with Scratch() as own:
        assert own.path.is_dir()
    assert not own.path.exists()


def test_that_of_a_killed_process_goes_when_the_next_starts_and_that_of_a_live_one_stays() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    path = Path(holder.stdout.readline().strip())
    with Scratch():
        assert path.is_dir(), "its process lives"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert path.is_dir(), "nobody could remove it"
    with Scratch() as own:
        assert not path.exists()
        assert own.path.is_dir()
