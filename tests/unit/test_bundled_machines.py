"""The machines that come with Poise: they load, are what their names say, and give times near the measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.cost.lookup import expert_curve
from poise.errors import MachineError
from poise.spec.bundled import bundled_machines, find_machine
from poise.spec.curve import Shape
from poise.spec.machine import Machine

QWEN3_235B = Shape(hidden=4096, intermediate=1536, dtype="bfloat16")


def test_every_one_has_eight_linked_devices_and_says_where_it_comes_from() -> None:
    assert bundled_machines() == ("h100", "h200", "one-slow", "spread-22", "spread-7")
    for name in bundled_machines():
        machine = find_machine(name)
        assert [device.name for device in machine.devices] == [f"gpu{rank}" for rank in range(8)]
        assert len(machine.links) == 8 * 7
        assert machine.source is not None
        assert "AIConfigurator" in machine.source
        assert machine.measured is None, "nobody measured it here"


@pytest.mark.parametrize(
    ("name", "spread"), [("h100", 1.0), ("h200", 1.0), ("spread-7", 1.07), ("spread-22", 1.22), ("one-slow", 1.5)]
)
def test_devices_are_as_far_apart_as_said(name: str, spread: float) -> None:
    seconds = [float(expert_curve(device, QWEN3_235B).seconds(4096, 16)) for device in find_machine(name).devices]
    assert max(seconds) / min(seconds) == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "tokens", "active", "measured_s"),
    [  # single rows of the tables: 8 ranks, balanced routing
        ("h200", QWEN3_235B, 16384, 16, 3.213654e-3),
        ("h200", QWEN3_235B, 1024, 16, 0.360513e-3),
        ("h200", Shape(hidden=7168, intermediate=2048, dtype="float8_e4m3fn"), 2048, 32, 1.419179e-3),
        ("h100", Shape(hidden=7168, intermediate=2048, dtype="float8_e4m3fn"), 384, 32, 0.665148e-3),
    ],
)
def test_times_are_near_the_tables(name: str, shape: Shape, tokens: int, active: int, measured_s: float) -> None:
    device = find_machine(name).devices[0]
    assert float(expert_curve(device, shape).seconds(tokens, active)) == pytest.approx(measured_s, rel=0.06)


def test_a_file_is_found_by_its_path_and_the_rest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    find_machine("h100").save(file)
    assert find_machine(str(file)) == find_machine("h100") == Machine.load(file)
    with pytest.raises(MachineError, match="machine 'h300' is neither a file nor one of h100, h200, one-slow"):
        find_machine("h300")
