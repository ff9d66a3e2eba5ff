"""The policy behind vLLM's signature, without vLLM: what it plans from, when it steps back, what it logs.

The same inside the real vLLM: tests/integration/engines.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from poise.integrations.vllm.expert_log import KEPT_WINDOWS, ExpertLog
from poise.integrations.vllm.policy import SpeedAwareRebalance
from poise.integrations.vllm.settings import settings_from
from poise.spec.statistics import read_expert_log

LAYERS, EXPERTS, RANKS, SLOTS = 3, 32, 8, 40
ENVIRONMENT = {"POISE_MACHINE": "one-slow", "POISE_SHAPE": "2048x768:bfloat16"}


def by_load(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_global_expert_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place of vLLM's own policy, and told from Poise's: experts in the order of their load, over and over."""
    order_LE = weight.double().argsort(dim=1, descending=True, stable=True)
    return order_LE.repeat(1, -(-num_replicas // order_LE.shape[1]))[:, :num_replicas]


def policy(environment: Mapping[str, str] = ENVIRONMENT, log: ExpertLog | None = None) -> SpeedAwareRebalance:
    return SpeedAwareRebalance(settings_from(environment), default=by_load, log=log, difference=lambda _: None)


def window(seed: int = 0) -> torch.Tensor:
    share_LE = np.random.default_rng(seed).lognormal(0, 1, (LAYERS, EXPERTS))
    return torch.from_numpy(share_LE / share_LE.sum(axis=1, keepdims=True) * 4e6).to(torch.int32)


def test_the_slow_device_gets_less_than_its_share() -> None:
    """Of the tokens: the last device is 1.5 times slower than the others."""
    weight = window()
    slots = policy()(weight, SLOTS, 1, 1, RANKS)
    assert (slots.dtype, tuple(slots.shape)) == (torch.int64, (LAYERS, SLOTS))
    for load_E, slots_P in zip(weight.double().numpy(), slots.numpy(), strict=True):
        copies_E = np.bincount(slots_P, minlength=EXPERTS)
        assert copies_E.min() >= 1
        load_R = (load_E / copies_E)[slots_P].reshape(RANKS, -1).sum(axis=1)
        assert load_R[-1] < 0.85 * load_R.mean()


def test_the_result_depends_on_load_map_and_settings_alone() -> None:
    old = policy()(window(1), SLOTS, 1, 1, RANKS)
    used = policy()
    used(window(2), SLOTS, 1, 1, RANKS)
    assert torch.equal(used(window(), SLOTS, 1, 1, RANKS, old), policy()(window(), SLOTS, 1, 1, RANKS, old))


def test_a_map_without_load_stays() -> None:
    nothing = torch.zeros((LAYERS, EXPERTS), dtype=torch.int32)
    old = torch.arange(SLOTS).flip(0).remainder(EXPERTS).repeat(LAYERS, 1)
    assert torch.equal(policy()(nothing, SLOTS, 1, 1, RANKS, old), old)
    assert policy()(nothing, SLOTS, 1, 1, RANKS).tolist() == [[slot % EXPERTS for slot in range(SLOTS)]] * LAYERS


def test_the_profile_run_compiles_the_planner_and_tells_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    """Not the first rearrangement, when requests wait: in a process that has compiled nothing yet."""
    script = (
        "import torch\n"
        "from poise.integrations.vllm.policy import SpeedAwareRebalance\n"
        "from poise.integrations.vllm.settings import settings_from\n"
        "from poise.plan.improve import repair_layers\n"
        "from poise.plan.packing import place_layers\n"
        f"policy = SpeedAwareRebalance(settings_from({ENVIRONMENT}), default=None, log=None, difference=lambda _: None)\n"
        "assert not place_layers.signatures and not repair_layers.signatures\n"
        f"old = torch.arange({SLOTS}).remainder({EXPERTS}).repeat({LAYERS}, 1)\n"
        f"policy(torch.zeros({LAYERS}, {EXPERTS}), {SLOTS}, 1, 1, {RANKS}, old)\n"
        "assert place_layers.signatures and repair_layers.signatures\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    policy()(torch.zeros((LAYERS, EXPERTS)), SLOTS, 1, 1, RANKS - 3)
    (record,) = caplog.records
    assert "5 ranks on a machine of 8 devices" in record.getMessage()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "POISE_MACHINE is not set; name a machine file"),
        ({"POISE_MACHINE": "h300"}, "machine 'h300' is neither a file nor one of"),
        ({"POISE_MACHINE": "h200"}, "choose one with POISE_SHAPE: 2048x512:bfloat16"),
        ({**ENVIRONMENT, "POISE_SHAPE": "1x1:int4"}, "POISE_SHAPE '1x1:int4' is none of the machine's"),
        ({**ENVIRONMENT, "POISE_MAX_MOVES": "-1"}, "POISE_MAX_MOVES is '-1'; it must be a whole number from 0"),
        ({**ENVIRONMENT, "POISE_WINDOW_STEPS": "0"}, "POISE_WINDOW_STEPS is '0'; it must be a whole number from 1"),
    ],
)
def test_what_is_wrong_is_said_once_and_the_default_decides(
    environment: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    used = policy(environment)
    for seed in range(3):
        assert torch.equal(used(window(seed), SLOTS, 1, 1, RANKS), by_load(window(seed), SLOTS, 1, 1, RANKS))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


def test_the_log_keeps_the_latest_windows_of_one_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "log.safetensors"
    used = policy(log=ExpertLog(file, window_steps=500))
    for seed in range(KEPT_WINDOWS + 2):
        used(window(seed), SLOTS, 1, 1, RANKS)
    used(window()[:1], SLOTS, 1, 1, RANKS)
    read = read_expert_log(file)
    assert read.steps == KEPT_WINDOWS
    assert np.allclose(read.load_NLE[-1], window(KEPT_WINDOWS + 1).double().numpy() / 500)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.safetensors"]
    (record,) = caplog.records
    assert "loads of the shape (1, 32) are not logged" in record.getMessage()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used = policy(log=ExpertLog(tmp_path / "none" / "log.safetensors", window_steps=500))
    for seed in range(3):
        assert torch.equal(used(window(seed), SLOTS, 1, 1, RANKS), policy()(window(seed), SLOTS, 1, 1, RANKS))
    (record,) = caplog.records
    assert "loads are not logged:" in record.getMessage()
