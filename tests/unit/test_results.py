"""Result files: names, counters, content, and what stamps them."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from poise.bench import run_benchmark
from poise.bench.machine import stamp
from poise.bench.results import write_result
from poise.errors import UsageError

DAY = date(2026, 3, 9)


def write(directory: Path, figure: float, *, overwrite: bool = False) -> Path:
    return write_result(directory, "disk", stamp(), {"figure": figure}, today=DAY, overwrite=overwrite)


def test_a_file_is_named_by_day_and_name_and_holds_the_stamp(tmp_path: Path) -> None:
    path = write(tmp_path / "results", 1.5)
    assert path == tmp_path / "results" / "2026-03-09-disk.json"
    content = json.loads(path.read_text())
    assert content["results"] == {"figure": 1.5}
    assert content["name"] == "disk"
    assert content["stamp"]["cores"] >= 1
    assert content["stamp"]["versions"]["python"].startswith("3.")


def test_a_second_run_gets_a_counter_and_overwrites_only_when_asked(tmp_path: Path) -> None:
    assert [write(tmp_path, figure).name for figure in (1.0, 2.0, 3.0)] == [
        "2026-03-09-disk.json",
        "2026-03-09-disk-2.json",
        "2026-03-09-disk-3.json",
    ]
    assert write(tmp_path, 4.0, overwrite=True).name == "2026-03-09-disk.json"
    figures = [json.loads(path.read_text())["results"]["figure"] for path in sorted(tmp_path.iterdir())]
    assert sorted(figures) == [2.0, 3.0, 4.0]


def test_a_result_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(UsageError, match=r"taken.*--output"):
        write(taken, 1.0)


def test_the_stamp_names_limits_and_no_one_s_machine() -> None:
    facts = stamp(limits_enforced=["memory 1 GiB"], limits_missing=["disk reads: not permitted"])
    assert facts.limits_enforced == ("memory 1 GiB",)
    assert facts.limits_missing == ("disk reads: not permitted",)
    assert facts.memory_bytes > 0
    assert facts.cpu
    host = Path("/proc/sys/kernel/hostname")
    if host.exists() and len(host.read_text().strip()) > 3:
        assert host.read_text().strip() not in str(facts)


def test_an_unknown_benchmark_lists_the_names() -> None:
    with pytest.raises(UsageError, match=r"'dusk'.*disk"):
        run_benchmark("dusk", output=None, json_output=False)
    with pytest.raises(UsageError, match=r"'parallel' has no suite 'nope'; choose from: probe$"):
        run_benchmark("parallel", output=None, json_output=False, suite="nope")
    with pytest.raises(UsageError, match=r"'disk' has no suites"):
        run_benchmark("disk", output=None, json_output=False, suite="probe")
    with pytest.raises(UsageError, match=r"parallel, suite probe, has no part 'x'; choose from: code, mixed"):
        run_benchmark("parallel", output=None, json_output=False, suite="probe", parts=("x",))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, poise.bench, poise.bench.machine, poise.bench.limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0
