"""`poise profile` on a tiny checkpoint: the table, the machine file, the page, and what happens when it is stopped."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poise.cli.profile import run_profile
from poise.errors import UsageError
from poise.profile import rates, run
from poise.profile.run import QUICK
from poise.spec.machine import Machine
from poise.units import MIB
from tests.conftest import MakeCheckpoint

EFFORT = replace(QUICK, cap_s=0.5, scratch_bytes=16 * MIB)


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "READ_BYTES", MIB)


def profile(
    model: Path,
    *,
    output: Path | None = None,
    report: Path | None = None,
    json_output: bool = False,
    devices: Sequence[str] = (),
) -> None:
    run_profile(model=str(model), output=output, report=report, json_output=json_output, devices=devices, effort=EFFORT)


def test_it_prints_tables_and_writes_a_machine_and_a_page(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile(checkpoint("qwen3_moe", "bfloat16"), output=tmp_path / "m.json", report=tmp_path / "r.html")
    printed = capsys.readouterr()
    for title in ("expert 64 x 32 bfloat16", "attention 64 x 64 bfloat16", "gate 64 x 8", "dense 64 x 128", "GFLOP/s"):
        assert title in printed.out
    assert "dram: " in printed.out
    assert "disk: " in printed.out
    assert f"poise: wrote {tmp_path / 'm.json'}" in printed.err
    assert Machine.load(tmp_path / "m.json").tier("disk").bytes_per_s > 0
    page = (tmp_path / "r.html").read_text()
    assert "expert, 64 x 32 bfloat16, 8 active" in page
    assert "closed form, worst error" in page
    assert '<script src="http' not in page, "the page needs nothing from the network"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.json", "r.html"]


def test_several_devices_make_one_machine_with_their_spread(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processor stands for two devices: what differs between them is its noise."""
    model = checkpoint("qwen3_moe", "bfloat16")
    profile(model, devices=("cpu", "cpu"), output=tmp_path / "m.json")
    printed = capsys.readouterr()
    assert "cpu1: expert 64 x 32 bfloat16" in printed.out
    assert "over the fastest one's" in printed.out
    first, second = Machine.load(tmp_path / "m.json").devices
    assert (first.name, second.name) == ("cpu0", "cpu1")
    assert [curve.shape for curve in first.curves] == [curve.shape for curve in second.curves]
    assert first.curves != second.curves, "each was measured"
    profile(model, devices=("cpu", "cpu"), json_output=True)
    said = json.loads(capsys.readouterr().out)
    assert {point["device"] for point in said["points"]} == {"cpu0", "cpu1"}
    assert said["spread"][0]["spread_frac"] >= 0
    with pytest.raises(UsageError, match="device 'cuda:99' is not there; choose among cpu"):
        profile(model, devices=("cuda:99",))


def test_json_is_one_object_with_every_point(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    profile(checkpoint("mixtral"), json_output=True)
    printed = json.loads(capsys.readouterr().out)
    assert Machine.from_json(printed["machine"]).devices[0].name == "cpu"
    point = printed["points"][0]
    assert (point["kind"], point["tokens"], point["active"]) == ("expert", 1, 1)
    assert point["time"]["low_s"] <= point["time"]["seconds"] <= point["time"]["high_s"]
    assert isinstance(point["is_certain"], bool)


def test_ctrl_c_leaves_no_file(checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "copy_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile(checkpoint("mixtral"), output=tmp_path / "m.json", report=tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_plotly_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_plotly(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "plotly":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(UsageError, match=r"--report needs Plotly.*pip install 'poise\[report\]'"):
        profile(tmp_path / "no-model", report=tmp_path / "r.html")
