"""The 4-bit store on the disk: made once, made whole, found again, and never mistaken for what it is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from poise import LLM, SamplingParams
from poise.engine.quantize import experts_in_4_bits
from poise.errors import BudgetError, CheckpointError, PoiseError, ReadError
from poise.model import int4_store
from poise.model.checkpoint import open_checkpoint
from poise.model.inspect import find_experts
from poise.model.int4_making import OnMade
from poise.model.int4_store import MANIFEST, Int4Store, fingerprint, store_directory
from poise.model.layout import CheckpointLayout
from poise.model.read_plan import ALIGNMENT, plan_reads
from tests.conftest import MakeCheckpoint, open_layout
from tests.quantised_checkpoints import change_tensors

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
BUDGET = 1 << 30


class Killed(Exception):  # noqa: N818 - it is no error
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return shutil.copytree(checkpoint("gpt_oss", "bfloat16"), tmp_path / "model")


def make(path: Path, on_made: OnMade | None = None, budget: int = BUDGET) -> tuple[CheckpointLayout, Int4Store]:
    """The store as an LLM asks for it."""
    model, layout, _ = open_layout(path)
    modules = find_experts(model, model.config.model_type)
    told = on_made or (lambda done, total: None)
    return experts_in_4_bits(open_checkpoint(path), layout, model, modules, budget_bytes=budget, on_made=told)


def stop_at(count: int, error: BaseException) -> OnMade:
    def on_made(done: int, total: int) -> None:
        if done == count:
            raise error

    return on_made


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_it_is_made_in_the_cache_once_and_said(model: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(model)
    counts: list[tuple[int, int]] = []
    _, store = make(model, lambda done, total: counts.append((done, total)))
    assert counts == [(done, 8) for done in range(9)]
    assert store.directory.parent == cache / "poise" / "int4"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"relative weight error {store.weight_error:.3f}" in said
    assert str(store.directory) in said
    make(model, lambda done, total: counts.append((done, total)))
    assert len(counts) == 9
    assert capsys.readouterr().err == ""
    assert contents(model) == before, "the checkpoint's directory is only read"


def test_an_expert_is_one_aligned_read_of_its_own_bytes(model: Path) -> None:
    layout, _ = make(model)
    for source in (source for row in layout.experts_LE for source in row):
        plan = plan_reads(source.parts)
        (extent,) = plan.extents
        assert extent.file_offset % ALIGNMENT == 0
        assert min(plan.slot_offsets.values()) == 0
        assert extent.needed_bytes == source.nbytes


def test_its_files_are_safetensors(model: Path) -> None:
    _, store = make(model)
    file = min(store.directory.glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.0.gate_up_proj"
    assert tensors[f"{name}.packed"].dtype == torch.uint8
    assert tensors[f"{name}.scale_zero"].dtype == torch.bfloat16
    assert tensors[f"{name}.bias"].dtype == torch.float32
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "poise-int4-1"


@pytest.mark.parametrize("count", [0, 1, 4, 6, 8])
def test_a_making_that_ended_early_goes_on_behind_its_last_whole_file(model: Path, count: int) -> None:
    with pytest.raises(Killed):
        make(model, stop_at(count, Killed()))
    directory = store_directory(open_checkpoint(model))
    left = contents(directory)
    assert MANIFEST not in left
    assert not [name for name in left if "partial" in name]
    begun: list[int] = []
    _, store = make(model, lambda done, _: begun.append(done))
    assert begun[0] == (count - 1) // 4 * 4 if count else begun[0] == 0
    resumed = contents(directory)
    shutil.rmtree(directory)
    make(model)
    assert contents(directory) == resumed
    assert store.weight_error < 0.1


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_a_store(model: Path) -> None:
    script = (
        "import os, signal, sys; from tests.unit.test_int4_store import make\n"
        "make(sys.argv[1], lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 6 else None)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(model)], cwd=root, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    directory = store_directory(open_checkpoint(model))
    assert [name for name in contents(directory) if name.endswith(".partial")], "it was writing"
    begun: list[int] = []
    make(model, lambda done, _: begun.append(done))
    assert begun[0] == 4
    assert sorted(contents(directory))[-1] == MANIFEST
    assert not list(directory.glob("*.partial"))


def test_another_checkpoint_has_another_store(model: Path) -> None:
    name = fingerprint(open_checkpoint(model))
    assert name == fingerprint(open_checkpoint(model))
    os.utime(model / "model.safetensors", ns=(1, 1))
    touched = fingerprint(open_checkpoint(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert len({name, touched, fingerprint(open_checkpoint(model))}) == 3


def test_a_processor_with_another_kernel_has_another_store(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fingerprint(open_checkpoint(model))
    monkeypatch.setattr(int4_store, "kernel_layout", lambda: "other")
    assert fingerprint(open_checkpoint(model)) != name


def test_a_store_in_the_way_of_the_format_before_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fingerprint(open_checkpoint(model))
    monkeypatch.setattr(int4_store, "FORMAT", 2)
    assert fingerprint(open_checkpoint(model)) != name


def flip_a_bit(file: Path, place: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))


def test_a_flipped_bit_is_one_line_with_the_file_and_the_remedy(model: Path) -> None:
    layout, store = make(model)
    for part in layout.experts_LE[1][2].parts:
        flip_a_bit(part.file, part.offset + part.nbytes // 2)
        with LLM(model, memory="1GiB", quantize="int4", expert_slots=1) as llm:
            prompts = [{"prompt_token_ids": [n, 99 - n, n + 1] * 9} for n in range(5, 12)]
            with pytest.raises(ReadError, match=r"damaged: expert 2 of .*; remove .* made again") as caught:
                llm.generate(prompts)
            assert str(part.file) in str(caught.value)
            assert "\n" not in str(caught.value)
        flip_a_bit(part.file, part.offset + part.nbytes // 2)
    assert store.directory.exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / MANIFEST).write_text('{"shards": {}}'), "belongs to other files"),
        (lambda path: (path / MANIFEST).write_text('{"shards": []}'), "manifest.json cannot be read"),
        (lambda path: min(path.glob("*.safetensors")).unlink(), "has 0 bytes, not"),
        (lambda path: os.truncate(min(path.glob("*.safetensors")), 5000), "has 5000 bytes, not"),
    ],
)
def test_a_damaged_store_is_refused_before_anything_runs(
    model: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    _, store = make(model)
    damage(store.directory)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        LLM(model, memory="1GiB", quantize="int4")
    assert f"remove {store.directory}, and it is made again" in str(caught.value)


def test_a_file_that_is_not_the_planned_one_is_made_again(model: Path) -> None:
    with pytest.raises(Killed):
        make(model, stop_at(6, Killed()))
    (file,) = store_directory(open_checkpoint(model)).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    make(model)
    assert file.read_bytes() == whole


def test_a_full_disk_is_found_before_and_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(CheckpointError, match=r"needs .* KiB of disk in .*, 4.88 KiB are free; .*XDG_CACHE_HOME"):
        make(model)


def test_a_disk_that_becomes_full_is_said_and_what_is_made_is_kept(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"became full .*; free some space, or set XDG_CACHE_HOME"):
        make(model, stop_at(6, OSError(errno.ENOSPC, "No space left on device")))
    assert len(list(store_directory(open_checkpoint(model)).glob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_is_said(model: Path, cache: Path) -> None:
    cache.write_text("a file, no directory")
    with pytest.raises(CheckpointError, match=r"cannot be made \(.*\); set XDG_CACHE_HOME"):
        make(model)


def test_too_little_memory_to_make_it_is_said_but_enough_to_run_from_it(model: Path) -> None:
    with pytest.raises(BudgetError, match="too small to make the 4-bit store") as caught:
        make(model, budget=1 << 20)
    make(model, budget=caught.value.smallest_bytes)
    make(model, budget=1 << 20)


def test_two_makings_at_once_are_refused(model: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another process is making"):
            make(model)
        raise Killed

    with pytest.raises(Killed):
        make(model, second)


def test_weights_that_are_not_finite_are_named(model: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][2, 3, 4] = float("inf")

    change_tensors(model, spoil)
    with pytest.raises(CheckpointError, match=r"down_proj of expert 2 in model.layers.1.* NaN or infinite"):
        make(model)


def test_an_unknown_kind_is_refused(model: Path) -> None:
    with pytest.raises(PoiseError, match="quantize 'int8' is not supported; choose one of none, int4"):
        LLM(model, memory="1GiB", quantize="int8")


def test_the_python_interface_says_what_it_runs_from(model: Path) -> None:
    with LLM(model, memory="1GiB", quantize="int4") as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=2))
        facts = llm.describe()
    assert facts["quantize"] == "int4"
    assert facts["int4_store"] == str(store_directory(open_checkpoint(model)))
