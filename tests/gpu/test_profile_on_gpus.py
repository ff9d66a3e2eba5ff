"""`poise profile --device cuda:0` makes a machine file that planners take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from poise.profile.run import QUICK
from poise.profile.several import profile_devices
from poise.profile.subject import subject_of_checkpoint
from poise.spec.machine import Machine
from tests.conftest import MakeCheckpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def test_a_gpu_is_profiled_into_a_machine_that_loads(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    subject = subject_of_checkpoint(checkpoint("mixtral", "bfloat16"))
    profile = profile_devices([subject], replace(QUICK, cap_s=2.0), ["cuda:0"], on_progress=lambda label, share: None)
    file = tmp_path / "machine.json"
    profile.machine.save(file)
    (device,) = Machine.load(file).devices
    assert device.name == "cuda:0"
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert {curve.kind for curve in device.curves} == {"expert", "attention", "gate", "dense"}
    assert profile.machine.measured is not None
    assert torch.cuda.get_device_name(0) in profile.machine.measured.cpu


def test_the_command_measures_a_gpu(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    command = [sys.executable, "-m", "poise", "profile", str(checkpoint("mixtral", "bfloat16"))]
    run = subprocess.run(
        [*command, "--device", "cuda:0", "--output", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["machine"]["devices"][0]["name"] == "cuda:0"
    assert Machine.load(file).devices[0].curves
