"""The machine file: what is written is read back, and whatever else lies there is refused in one line that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from poise.errors import MachineError
from poise.spec.curve import ClosedForm, Curve, Point, Shape
from poise.spec.machine import Device, Link, Machine, Provenance, Tier

SHAPE = Shape(hidden=2048, intermediate=768, dtype="bfloat16")
CURVES = (
    Curve(kind="expert", shape=SHAPE, points=(Point(tokens=1, active=1, seconds=1e-3),)),
    Curve(kind="dense", shape=SHAPE, closed_form=ClosedForm(a_s=1e-3, b_s=1e-6, p=2.5)),
    Curve(
        kind="attention",
        shape=SHAPE,
        points=(Point(tokens=8, active=1, seconds=2e-3),),
        context_tokens=64,
        row_tokens=1,
    ),
)
MACHINE = Machine(
    devices=(
        Device(name="gpu0", memory_bytes=1 << 34, speed=1.07, curves=CURVES),
        Device(name="gpu1", memory_bytes=1 << 34),
    ),
    links=(Link(source="gpu0", target="gpu1", bytes_per_s=4e10, latency_s=1e-5),),
    tiers=(Tier(name="disk", capacity_bytes=1 << 40, bytes_per_s=1.1e9),),
    measured=Provenance(date="2026-03-09T12:00:00+00:00", cpu="EPYC", threads=2, torch="2.13.0", poise="0.1.0"),
)


def test_a_file_holds_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    MACHINE.save(file)
    assert Machine.load(file) == MACHINE
    assert json.loads(file.read_text())["version"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["machine.json"]


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text("something else, and longer than nothing")
    MACHINE.save(file)
    assert Machine.load(file) == MACHINE


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"nowhere.m\.json cannot be written \(No such file or directory\)"):
        MACHINE.save(tmp_path / "nowhere" / "m.json")


def test_parts_are_found_by_name_and_others_are_listed() -> None:
    assert MACHINE.device("gpu1").name == "gpu1"
    assert MACHINE.tier("disk").bytes_per_s == 1.1e9
    assert MACHINE.link("gpu0", "gpu1").latency_s == 1e-5
    with pytest.raises(MachineError, match="no device 'gpu2'; the machine has: gpu0, gpu1"):
        MACHINE.device("gpu2")
    with pytest.raises(MachineError, match="no tier 'dram'; the machine has: disk"):
        MACHINE.tier("dram")
    with pytest.raises(MachineError, match="no link from 'gpu1' to 'gpu0'; the machine has: gpu0 to gpu1"):
        MACHINE.link("gpu1", "gpu0")


def changed(*path: str | int, value: Any) -> dict[str, Any]:
    """The machine's JSON with one value replaced; ``...`` takes the field out."""
    content: Any = json.loads(json.dumps(MACHINE.to_json()))
    place = content
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("version",), 2, "m.json is of version 2; this Poise reads version 1"),
        (("version",), ..., "m.json has no field 'version'"),
        (("version",), True, "m.json.version is True; it must be a whole number"),
        (("colour",), "red", "m.json has unknown fields: colour"),
        (("devices",), [], "m.json: a machine needs at least one device"),
        (("devices",), {}, "m.json.devices is an object; it must be a list"),
        (("devices", 0), 7, "m.json.devices[0] is 7, not an object"),
        (("devices", 0, "name"), ..., "m.json.devices[0] has no field 'name'"),
        (("devices", 1, "name"), "gpu0", "m.json: there are two devices or tiers 'gpu0'"),
        (("devices", 0, "speed"), 0, "m.json.devices[0]: speed is 0.0; it must be above 0"),
        (("devices", 0, "speed"), "fast", "m.json.devices[0].speed is 'fast'; it must be a finite number"),
        (("devices", 0, "speed"), 10**400, "it must be a finite number"),
        (("devices", 0, "memory_bytes"), 1.5, "m.json.devices[0].memory_bytes is 1.5; it must be a whole number"),
        (("devices", 0, "curves", 0, "kind"), "experts", "curves[0]: kind is 'experts'; it must be one of expert,"),
        (("devices", 0, "curves", 0, "kind"), "attention", "row_tokens None and context_tokens None of an attention"),
        (("devices", 0, "curves", 2, "kind"), "gate", "a curve of kind gate has no row_tokens"),
        (("devices", 0, "curves", 2, "row_tokens"), 65, "row_tokens 65 and context_tokens 64"),
        (("devices", 0, "curves", 0, "points"), [], "a curve needs either points or a closed_form"),
        (
            ("devices", 0, "curves", 0, "points"),
            [[1, 1]],
            "points[0] is a list; it must be a list of 3: tokens, active",
        ),
        (("devices", 0, "curves", 0, "points", 0, 2), -1, "points[0]: seconds is -1.0; it must be above 0"),
        (("devices", 0, "curves", 0, "points", 0, 1), 2, "points[0]: tokens is 1; it must be at least the active"),
        (("devices", 0, "curves", 0, "points"), [[1, 1, 1.0]] * 2, "two points for the same tokens"),
        (("devices", 0, "curves", 1, "closed_form", "p"), 0, "closed_form: p is 0.0; it must be 0.1 to 100"),
        (("devices", 0, "curves", 1, "closed_form"), ..., "a curve needs either points or a closed_form"),
        (("devices", 0, "curves", 1, "shape", "hidden"), 0, "shape: hidden is 0; it must be at least 1"),
        (("links", 0, "target"), "gpu9", "a link's end is 'gpu9'; it must be one of gpu0, gpu1, disk"),
        (("links", 0, "latency_s"), -1.0, "m.json.links[0]: latency_s is -1.0; it must be 0 or more"),
        (("tiers", 0, "bytes_per_s"), float("nan"), "m.json.tiers[0].bytes_per_s is nan; it must be a finite number"),
        (("measured", "threads"), "two", "m.json.measured.threads is 'two'; it must be a whole number"),
    ],
)
def test_what_is_not_a_machine_is_refused_where_it_goes_wrong(
    path: tuple[str | int, ...], value: Any, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text(json.dumps(changed(*path, value=value)))
    with pytest.raises(MachineError) as refusal:
        Machine.load(Path("m.json"))
    assert complaint in str(refusal.value)
    assert str(refusal.value).startswith("m.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is a list, not an object"),
        (b"null", "is None, not an object"),
    ],
)
def test_a_file_that_is_something_else(content: bytes, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_bytes(content)
    with pytest.raises(MachineError, match=complaint):
        Machine.load(file)


def test_a_missing_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot be read \(No such file.*`poise profile --output"):
        Machine.load(tmp_path / "none.json")


def test_the_same_curve_twice_is_refused() -> None:
    with pytest.raises(MachineError, match="there are two curves"):
        Device(name="cpu", memory_bytes=1, curves=(CURVES[0], CURVES[0]))
