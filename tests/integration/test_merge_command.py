"""Machine files of single devices put together, and the spread that placement lives on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from poise.cli import main
from poise.errors import MachineError
from poise.profile.merge import merge_machines, spreads
from poise.spec.curve import ClosedForm, Curve, Point, Shape
from poise.spec.machine import Device, Link, Machine, Provenance, Tier

SHAPE = Shape(hidden=2048, intermediate=768, dtype="bfloat16")


def machine(slower: float = 1.0, name: str = "cpu", disk: float = 2e9) -> Machine:
    points = tuple(Point(tokens=n, active=1, seconds=slower * s) for n, s in ((1, 1e-3), (64, 4e-3), (512, 3e-2)))
    return Machine(
        devices=(Device(name=name, memory_bytes=1 << 34, curves=(Curve(kind="expert", shape=SHAPE, points=points),)),),
        links=(Link(source="disk", target=name, bytes_per_s=1e9),),
        tiers=(Tier(name="disk", capacity_bytes=1 << 40, bytes_per_s=disk),),
        measured=Provenance(date="2026-03-09T12:00:00+00:00", cpu="EPYC", threads=2, torch="2.13.0", poise="0.1.0"),
    )


def test_devices_keep_their_order_and_get_their_rank() -> None:
    merged = merge_machines([machine(), machine(1.1, disk=1e9), machine(1.05)], ["a", "b", "c"])
    assert [device.name for device in merged.devices] == ["cpu0", "cpu1", "cpu2"]
    assert {(link.source, link.target) for link in merged.links} == {("disk", f"cpu{rank}") for rank in range(3)}
    assert merged.tier("disk").bytes_per_s == 1e9
    few, many = spreads(merged)
    assert (few.tokens, many.tokens) == (1, 512)
    assert many.over_fastest_D == pytest.approx((1.0, 1.1, 1.05))


def test_names_of_their_own_stay() -> None:
    merged = merge_machines([machine(name="left"), machine(name="right")], ["a", "b"])
    assert [device.name for device in merged.devices] == ["left", "right"]


def test_closed_forms_and_speeds_are_compared_too() -> None:
    curve = Curve(kind="expert", shape=SHAPE, closed_form=ClosedForm(a_s=1e-4, b_s=1e-6, p=1.5))
    each = [
        Machine(devices=(Device(name="gpu", memory_bytes=1, speed=speed, curves=(curve,)),)) for speed in (1.0, 0.8)
    ]
    assert [spread.over_fastest_D[1] for spread in spreads(merge_machines(each, ["a", "b"]))] == pytest.approx(
        [1.25] * 2
    )


def test_what_is_no_machine_together_is_refused() -> None:
    other = Shape(hidden=2048, intermediate=768, dtype="float32")
    curve = replace(machine().devices[0].curves[0], shape=other)
    unlike = replace(machine(), devices=(replace(machine().devices[0], curves=(curve,)),))
    measured = machine().measured
    assert measured is not None
    for wrong, complaint in (
        (unlike, "only one of a and b has experts of 2048 x 768 bfloat16"),
        (replace(machine(), measured=None), "only one of a and b was measured"),
        (replace(machine(), measured=replace(measured, threads=1)), "a was measured with threads 2 and b with 1"),
    ):
        with pytest.raises(MachineError, match=complaint):
            merge_machines([machine(), wrong], ["a", "b"])


def test_the_command_shows_the_spread_and_writes_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine().save(Path("a.json"))
    machine(1.22).save(Path("b.json"))
    for arguments in (["-o", "m.json"], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["profile", "--merge", "a.json", "b.json", *arguments])
        assert end.value.code == 0
    shown = capsys.readouterr()
    assert "22.0%" in shown.out
    assert shown.err == f"poise: wrote {tmp_path / 'm.json'}\n"
    assert json.loads(shown.out.splitlines()[-1])["spread"][1]["spread_frac"] == pytest.approx(0.22)
    assert len(Machine.load(Path("m.json")).devices) == 2
