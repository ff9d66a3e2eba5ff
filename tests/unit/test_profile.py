"""Profiling tiny models of many kinds: what comes out is a machine that the cost model can use. No speed is asserted."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from poise.cost.lookup import attention_curve, expert_curve, token_curve
from poise.engine.blueprint import Options, draw_up
from poise.errors import UsageError
from poise.model.int4 import Int4Weight
from poise.profile import calibrate as calibration
from poise.profile import rates
from poise.profile.calibrate import calibrate, default_cache_folder, machine_fingerprint, typical_spread
from poise.profile.experts import load_experts
from poise.profile.layers import Layers
from poise.profile.measure import Measurement
from poise.profile.rates import ExpertReads, copy_run, scratch_experts
from poise.profile.run import Effort, profile_machine
from poise.profile.subject import Subject, subject_of_checkpoint, subject_of_config
from poise.spec.machine import Machine
from poise.units import MIB
from tests.conftest import MakeCheckpoint, tiny_config

TINY = Effort(
    expert_tokens=(1, 2, 8),
    grouped=((1, 2), (4, 2)),
    decode_rows=(1, 3),
    decode_contexts=(8, 16),
    prefill_row_tokens=4,
    prefill_rows=(1, 2),
    prefill_contexts=(4, 8),
    head_tokens=(1, 4),
    cap_s=0.0,
    max_flops=1e12,
    scratch_bytes=4 * MIB,
)
ARCHITECTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "qwen3_next", "jamba")


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "READ_BYTES", MIB)
    monkeypatch.setattr(rates, "SCRATCH_BYTES", MIB)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_work_is_measured(architecture: str, checkpoint: MakeCheckpoint) -> None:
    subject = subject_of_checkpoint(checkpoint(architecture, "bfloat16"))
    told: list[float] = []
    profile = profile_machine([subject], TINY, on_progress=lambda label, share: told.append(share))
    device = profile.machine.device("cpu")
    assert (expert_curve(device, subject.expert_shape).seconds([1, 8, 100], [1, 2, 4]) > 0).all()
    assert token_curve(device, "gate", subject.gate_shape).seconds(5) > 0
    assert token_curve(device, "dense", subject.dense_shape).seconds(5) > 0
    for row_tokens in (1, 4):
        curve = attention_curve(device, subject.attention_shape, row_tokens=row_tokens)
        assert curve.row_tokens == row_tokens
        assert (curve.seconds(3, [4, 12, 99]) > 0).all()
    assert profile.machine.tier("disk").bytes_per_s > 0
    assert profile.machine.tier("dram").bytes_per_s > 0
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_experts_in_4_bits_are_timed_with_their_own_kernel(architecture: str, checkpoint: MakeCheckpoint) -> None:
    """gpt_oss has transposed matrices and biases."""
    path = checkpoint(architecture, "bfloat16")
    subject, plain = subject_of_checkpoint(path, int4=True), subject_of_checkpoint(path)
    experts = load_experts(subject, scratch_bytes=MIB)
    experts.ask(1)
    _, weights = experts.take()
    matrices = {param: shape for param, shape in subject.param_shapes.items() if len(shape) == 2}
    assert weights.keys() == matrices.keys()
    for param, shape in matrices.items():
        matrix = weights[param]
        assert isinstance(matrix, Int4Weight)
        assert (matrix.outputs, matrix.inputs) == (shape if architecture == "qwen3_moe" else shape[::-1])
    device = profile_machine([subject], TINY, on_progress=lambda *_: None).machine.device("cpu")
    assert subject.expert_shape == replace(plain.expert_shape, dtype="int4")
    assert (expert_curve(device, subject.expert_shape).seconds([1, 8, 100], [1, 2, 4]) > 0).all()
    assert attention_curve(device, plain.attention_shape, row_tokens=1).seconds(3, 4) > 0
    assert machine_fingerprint(subject, TINY) != machine_fingerprint(plain, TINY)


def test_a_plan_of_experts_in_4_bits_goes_by_their_curve(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("qwen3_moe", "bfloat16")
    machine = profile_machine(
        [subject_of_checkpoint(path), subject_of_checkpoint(path, int4=True)], TINY, on_progress=lambda *_: None
    ).machine
    device = machine.devices[0]
    slow = [
        replace(curve, points=tuple(replace(point, seconds=9.0) for point in curve.points))
        if curve.shape.dtype == "int4"
        else curve
        for curve in device.curves
    ]
    machine = replace(machine, devices=(replace(device, curves=tuple(slow)),))
    for quantize, is_slow in (("none", False), ("int4", True)):
        drawn = draw_up(path, Options(machine=machine, quantize=quantize), makes_store=False)
        assert drawn.costs.source == "measured on this machine"
        assert (drawn.costs.layers.experts_s(1, 1) > 8) == is_slow


def test_a_machine_says_what_it_was_measured_with(checkpoint: MakeCheckpoint) -> None:
    profile = profile_machine([subject_of_checkpoint(checkpoint("mixtral"))], TINY, on_progress=lambda *_: None)
    assert profile.machine.measured is not None
    assert profile.machine.measured.threads == torch.get_num_threads()
    assert profile.machine.measured.torch == torch.__version__
    assert any("less certain" in note for note in profile.notes), "without time nothing is certain"


def test_the_shapes_are_the_models(checkpoint: MakeCheckpoint) -> None:
    subject = subject_of_checkpoint(checkpoint("gpt_oss", "bfloat16"))
    assert str(subject.expert_shape) == "64 x 96 bfloat16"
    assert str(subject.attention_shape) == "64 x 64 bfloat16"
    assert str(subject.gate_shape) == "64 x 4 bfloat16"
    assert str(subject.dense_shape) == "64 x 128 bfloat16"
    assert subject.expert_flops_per_token == 2 * 3 * 64 * 96
    assert subject.period == 2, "a sliding layer and a full one"


def test_a_configuration_needs_no_checkpoint_and_only_its_first_layers_take_memory() -> None:
    subject = subject_of_config("tiny", tiny_config("mixtral", num_hidden_layers=6), torch.bfloat16)
    filled = [not any(p.is_meta for p in layer.parameters()) for layer in subject.model.model.layers]
    assert filled == [True, True, False, False, False, False]
    profile = profile_machine([subject], TINY, on_progress=lambda *_: None)
    assert any("scratch file" in note for note in profile.notes)
    assert profile.machine.device("cpu").curves


def test_the_context_grows_in_no_measured_cache(checkpoint: MakeCheckpoint) -> None:
    subject = subject_of_checkpoint(checkpoint("qwen3_moe"))
    with Layers(subject) as layers:
        run = layers.run(rows=3, row_tokens=1, context_tokens=9)
        assert len(run()) == 2
        assert len(run()) == 2, "the second run finds the cache as the first did"
        assert layers.cache_bytes(16) == 2 * layers.cache_bytes(8)
    assert not subject.model.get_submodule("model.layers.0.mlp")._forward_pre_hooks


def test_calibration_runs_once(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    subject = subject_of_checkpoint(checkpoint("mixtral"))
    machine = calibrate(subject, effort=TINY, cache_folder=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"machine-{machine_fingerprint(subject, TINY)}.json"
    assert Machine.load(file) == machine
    marked = replace(machine, links=(), devices=(replace(machine.devices[0], speed=2.0),))
    marked.save(file)
    assert calibrate(subject, effort=TINY, cache_folder=tmp_path / "cache") == marked


def test_a_damaged_cache_is_measured_anew(
    checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = subject_of_checkpoint(checkpoint("mixtral"))
    file = tmp_path / f"machine-{machine_fingerprint(subject, TINY)}.json"
    file.write_text('{"version": 1, "devices"')
    with caplog.at_level(logging.WARNING):
        machine = calibrate(subject, effort=TINY, cache_folder=tmp_path)
    assert "is not JSON" in caplog.text
    assert Machine.load(file) == machine


def test_a_cache_that_cannot_be_written_is_said_and_no_error(
    checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        calibrate(subject_of_checkpoint(checkpoint("mixtral")), effort=TINY, cache_folder=tmp_path / "file" / "cache")
    assert "is not kept" in caplog.text


def test_what_a_busy_machine_gives_is_used_but_not_kept(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subject = subject_of_checkpoint(checkpoint("mixtral"))
    profile = profile_machine([subject], TINY, on_progress=lambda *_: None)
    wide = Measurement(seconds=1.0, low_s=0.9, high_s=1.4, runs=6)
    busy = replace(profile, points=tuple(replace(point, time=wide) for point in profile.points))
    monkeypatch.setattr(calibration, "profile_machine", lambda *_, **__: busy)
    with caplog.at_level(logging.WARNING):
        assert calibrate(subject, effort=TINY, cache_folder=tmp_path) == profile.machine
    assert "this machine is busy: the times measured of it vary by 40 %" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_disk_alone_can_be_too_busy(checkpoint: MakeCheckpoint) -> None:
    """Two runs are all that a slow disk has time for; one says nothing."""
    profile = profile_machine([subject_of_checkpoint(checkpoint("mixtral"))], TINY, on_progress=lambda *_: None)
    quiet, wide = (Measurement(seconds=1.0, low_s=0.9, high_s=high_s, runs=2) for high_s in (1.1, 1.4))
    points = tuple(replace(point, time=replace(quiet, runs=6)) for point in profile.points)
    steady = replace(profile, points=points, disk=quiet)
    assert typical_spread(steady) == pytest.approx(0.1)
    assert typical_spread(replace(steady, disk=wide)) == pytest.approx(0.4)
    assert typical_spread(replace(steady, disk=replace(wide, runs=1))) == pytest.approx(0.1)


def test_what_was_measured_otherwise_is_measured_anew(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of_checkpoint(checkpoint("mixtral"))
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "MEASURED_AS", calibration.MEASURED_AS - 1)
        old = calibrate(subject, effort=TINY, cache_folder=tmp_path)
    replace(old, devices=(replace(old.devices[0], speed=2.0),)).save(next(tmp_path.iterdir()))
    assert calibrate(subject, effort=TINY, cache_folder=tmp_path).devices[0].speed == 1.0
    assert len(list(tmp_path.iterdir())) == 2


def test_other_shapes_threads_and_efforts_are_measured_for_themselves(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(name: str, dtype: str = "float32", effort: Effort = TINY) -> str:
        return machine_fingerprint(subject_of_checkpoint(checkpoint(name, dtype)), effort)

    prints = [of("mixtral"), of("mixtral", "bfloat16"), of("qwen3_moe"), of("mixtral", effort=replace(TINY, cap_s=1.0))]
    monkeypatch.setattr(calibration, "cpu_model", lambda: "another")
    prints.append(of("mixtral"))
    assert len(set(prints)) == len(prints)
    assert of("mixtral") == prints[-1]


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "poise"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_folder() == tmp_path / "home" / ".cache" / "poise"


def test_a_calibrated_subject_of_the_engine_needs_no_second_model(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    built = subject_of_checkpoint(checkpoint("mixtral"))
    same = Subject(
        name="engine", model=built.model, modules=built.modules, dtype=built.dtype, sources_LE=built.sources_LE
    )
    assert same.fingerprint() == built.fingerprint()
    assert calibrate(same, effort=TINY, cache_folder=tmp_path).devices


def test_scratch_experts_are_gone_afterwards(tmp_path: Path) -> None:
    with scratch_experts(100_000, tmp_path) as experts, ExpertReads(experts) as reads:
        assert reads.run()[0] > 0
        assert reads.bytes_per_run == pytest.approx(MIB, rel=0.1)
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_scratch_experts_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written.*set TMPDIR"), scratch_experts(10, tmp_path / "none"):
        raise AssertionError("never here")


def test_a_copy_takes_time() -> None:
    assert copy_run(MIB)()[0] > 0


def test_importing_the_package_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, poise.profile.mounts, poise.profile.hardware, poise.cost.lookup, poise.report.curves\n"
    code += "print(*(name for name in ('torch', 'transformers', 'plotly') if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.dumps(run.stdout.split()) == "[]"
