"""Ranks with 4-bit experts, and ranks whose speeds were measured before: options of one process that several heed too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise import LLM, SamplingParams
from poise.engine.parallel_llm import ParallelLLM
from poise.engine.vibe import Vibe
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from poise.spec.curve import ClosedForm, Curve, Shape
from poise.spec.machine import Device, Machine
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parallel.test_parallel_llm import Rotate, expected
from tests.ranks import start_ranks

PATIENT = Patience(start_s=60, behind_s=60)
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def generate(
    launch: Launch, path: Path, prompts: list[list[int]], cache: Path, options: dict[str, Any]
) -> dict[str, Any]:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, **options) as llm:
        first_LS = llm.placement.slot_to_expert_LS
        if launch.rank > 0:
            llm.follow()
            return {"first_LS": first_LS}
        made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS)
        return {
            "tokens": [list(each.outputs[0].token_ids) for each in made],
            "first_LS": first_LS,
            "history": [] if llm.balancing is None else llm.balancing.history,
            "facts": llm.describe(),
        }


def test_4_bit_experts_give_what_one_process_gives_with_them_and_move(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks make the store: one of them, while the others wait."""
    path, prompts, cache = checkpoint("mixtral"), draw_prompts((5, 17, 9)), tmp_path / "cache"
    options = {"quantize": "int4", "policy": Rotate(), "redundant_slots": 0}
    results = start_ranks(generate, 2, tmp_path / "ranks", path, prompts, cache, options).results(within_s=120)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with LLM(path, memory="2GiB", quantize="int4") as llm:
        alone = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS)
    assert results[0]["tokens"] == [list(each.outputs[0].token_ids) for each in alone]
    assert sum(change.moved_experts for change in results[0]["history"]) > 0
    with LLM(path, memory="2GiB") as llm:
        in_full = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS)
    assert results[0]["tokens"] != [list(each.outputs[0].token_ids) for each in in_full], (
        "4 bits make a difference here"
    )


def open_on(launch: Launch, path: Path, device: str) -> None:
    ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, device=device).close()


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "no GPU that torch can use"), ("tpu", "device 'tpu' is not known")]
)
def test_a_device_that_is_not_there_is_refused_in_one_line(
    device: str, message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ranks = start_ranks(open_on, 2, tmp_path, checkpoint("qwen3_moe"), device)
    assert ranks.wait() == [2, 2]
    (line,) = ranks.output(0).splitlines()
    assert message in line


def machine(shape: Shape, *speeds: float) -> Machine:
    curve = Curve(kind="expert", shape=shape, closed_form=ClosedForm(a_s=1e-4, b_s=1e-5, p=1.5))
    return Machine(
        devices=tuple(
            Device(name=f"d{rank}", memory_bytes=1 << 30, speed=speed, curves=(curve,))
            for rank, speed in enumerate(speeds)
        )
    )


def test_vibe_starts_from_the_speeds_of_a_machine(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9))
    unequal = machine(Shape(hidden=64, intermediate=32, dtype="float32"), 1.0, 0.4, 1.0, 1.0)
    options = {"machine": unequal, "policy": Vibe()}
    results = start_ranks(generate, 4, tmp_path, path, prompts, tmp_path, options).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, 20) for prompt in prompts]
    first_LS = results[0]["first_LS"]
    np.testing.assert_array_equal(first_LS, results[1]["first_LS"])
    share_E = 1.0 / np.bincount(first_LS[0], minlength=8)
    load_R = share_E[first_LS[0]].reshape(4, -1).sum(axis=1)
    assert load_R[1] < 0.8 * np.delete(load_R, 1).min(), "the slow rank's experts have copies elsewhere"


def open_with(launch: Launch, path: Path, devices_R: list[Machine]) -> None:
    ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, balance="vibe", machine=devices_R[launch.rank]).close()


def test_machines_that_do_not_fit_are_refused_in_one_line(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shape = Shape(hidden=64, intermediate=32, dtype="float32")
    one, other = machine(shape, 1.0, 0.5), machine(shape, 1.0, 0.6)
    strange = machine(Shape(hidden=64, intermediate=33, dtype="float32"), 1.0)
    for devices_R, message in (
        ([one, other], "rank 1 has machine"),
        ([strange, strange], "has no expert curve for"),
        ([machine(shape, 1.0, 1.0, 1.0)] * 2, "2 ranks on a machine of 3 devices"),
    ):
        directory = tmp_path / message.split()[-1]
        ranks = start_ranks(open_with, 2, directory, checkpoint("qwen3_moe"), devices_R)
        assert ranks.wait() == [2, 2]
        (line,) = [line for line in ranks.output(0).splitlines() if line.startswith("error: ")]
        assert message in line
