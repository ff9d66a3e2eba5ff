"""The plug-in inside the real vLLM 0.33.0: found by its loader, under its configuration, judged by its own functions."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: `make test-engines` installs it")

from vllm.config.parallel import EPLBConfig
from vllm.distributed.eplb.async_worker import run_rebalance_experts
from vllm.distributed.eplb.eplb_state import compute_logical_maps
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
from vllm.plugins import load_plugins_by_group

from poise.integrations.files import read_statistics
from poise.plan.placement import predict_s_LR
from poise.plan.rank_costs import RankCosts
from poise.spec.bundled import find_machine
from poise.spec.curve import Shape

LAYERS, EXPERTS, RANKS, SLOTS = 6, 64, 8, 72
SHAPE = Shape(hidden=2048, intermediate=768, dtype="bfloat16")
WINDOW = 1000

Load = Callable[[], Any]


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads the plug-in as vLLM does, after the environment is set; returns the policy that vLLM's configuration chooses."""
    for name in ("POISE_MACHINE", "POISE_SHAPE", "POISE_EXPERT_LOG", "POISE_MAX_MOVES", "POISE_WINDOW_STEPS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(EPLB_POLICIES)

    def load() -> Any:
        EPLB_POLICIES.update(before)
        load_plugins_by_group("vllm.general_plugins")["poise"]()
        return EPLB_POLICIES[EPLBConfig().policy]

    yield load
    EPLB_POLICIES.update(before)


@pytest.fixture
def policy(plugged: Load, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("POISE_MACHINE", "spread-22")
    monkeypatch.setenv("POISE_SHAPE", "2048x768:bfloat16")
    return plugged()


def window(seed: int = 0) -> torch.Tensor:
    """Tokens of a window of 1,000 steps of some 4,000 choices, as vLLM sums them: int32."""
    share_LE = np.random.default_rng(seed).lognormal(0, 1, (LAYERS, EXPERTS))
    return torch.from_numpy(share_LE / share_LE.sum(axis=1, keepdims=True) * 4000 * WINDOW).to(torch.int32)


def rebalanced(policy: Any, load: torch.Tensor, old: torch.Tensor | None = None, ranks: int = RANKS) -> torch.Tensor:
    found = policy.rebalance_experts(load, SLOTS, 1, 1, ranks, old)
    assert isinstance(found, torch.Tensor)
    return found


def seconds(load: torch.Tensor, slots: torch.Tensor) -> float:
    costs = RankCosts.of_machine(find_machine("spread-22"), shape=SHAPE)
    return float(predict_s_LR(load.double().numpy() / WINDOW, slots.numpy(), costs).max(axis=1).sum())


def moved(old: torch.Tensor, new: torch.Tensor) -> int:
    """Experts that come to a rank that did not have them."""
    pairs = zip(old.reshape(LAYERS * RANKS, -1).tolist(), new.reshape(LAYERS * RANKS, -1).tolist(), strict=True)
    return sum(len(set(after) - set(before)) for before, after in pairs)


def test_the_entry_point_is_declared() -> None:
    (point,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "poise")
    assert point.value == "poise.integrations.vllm.plugin:register"


def test_the_policy_is_vllms_kind_and_registering_again_changes_nothing(policy: Any) -> None:
    assert issubclass(policy, AbstractEplbPolicy)
    load_plugins_by_group("vllm.general_plugins")["poise"]()
    assert EPLB_POLICIES["default"] is policy


def test_vllm_takes_the_map_and_finds_every_expert(policy: Any) -> None:
    slots = rebalanced(policy, window())
    assert (slots.dtype, slots.device.type, tuple(slots.shape)) == (torch.int64, "cpu", (LAYERS, SLOTS))
    logical_to_physical, replicas = compute_logical_maps(slots, EXPERTS)
    assert int(replicas.min()) >= 1
    assert replicas.sum(dim=1).tolist() == [SLOTS] * LAYERS
    assert tuple(logical_to_physical.shape[:2]) == (LAYERS, EXPERTS)


def test_devices_finish_together_sooner_than_under_vllms_own_policy(policy: Any) -> None:
    load = window()
    assert seconds(load, rebalanced(policy, load)) < seconds(load, rebalanced(DefaultEplbPolicy, load))


def test_a_small_drift_moves_few_experts_and_the_rest_keep_their_slots(policy: Any) -> None:
    load = window()
    old = rebalanced(policy, load)
    drifted = (load * torch.from_numpy(np.random.default_rng(1).lognormal(0, 0.1, load.shape))).to(torch.int32)
    new = rebalanced(policy, drifted, old)
    assert seconds(drifted, new) <= seconds(drifted, old)
    assert moved(old, new) < moved(old, rebalanced(DefaultEplbPolicy, drifted, old)) / 3
    kept = DefaultEplbPolicy.preserve_intragpu_slots(new.numpy(), RANKS, old.numpy())
    assert np.array_equal(kept, new.numpy()), "vLLM's own rule finds nothing to put back"


def test_moves_are_limited_as_asked(plugged: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_MACHINE", "spread-22")
    monkeypatch.setenv("POISE_SHAPE", "2048x768:bfloat16")
    monkeypatch.setenv("POISE_MAX_MOVES", "3")
    old = torch.arange(SLOTS).remainder(EXPERTS).repeat(LAYERS, 1)
    assert 0 < moved(old, rebalanced(plugged(), window(), old)) <= 3


def test_the_asynchronous_worker_runs_it(policy: Any) -> None:
    old = torch.arange(SLOTS).remainder(EXPERTS).repeat(LAYERS, 1)
    statistics = SimpleNamespace(
        global_expert_load_window=window(), num_replicas=SLOTS, num_groups=1, num_nodes=1, num_gpus=RANKS
    )
    found = run_rebalance_experts(
        SimpleNamespace(eplb_stats=statistics), SimpleNamespace(policy=policy), old, stream=None
    )
    assert torch.equal(found, rebalanced(policy, window(), old))


def test_groups_and_nodes_are_taken(policy: Any) -> None:
    slots = policy.rebalance_experts(window(), SLOTS, 8, 2, RANKS, None)
    assert int(compute_logical_maps(slots, EXPERTS)[1].min()) >= 1


def test_no_load_changes_nothing(policy: Any) -> None:
    nothing = torch.zeros((LAYERS, EXPERTS), dtype=torch.int32)
    old = torch.arange(SLOTS).flip(0).remainder(EXPERTS).repeat(LAYERS, 1)
    assert torch.equal(rebalanced(policy, nothing, old), old)
    assert int(compute_logical_maps(rebalanced(policy, nothing), EXPERTS)[1].min()) >= 1


def test_an_old_map_with_empty_slots_is_not_leant_on(policy: Any) -> None:
    old = torch.arange(SLOTS).remainder(EXPERTS).repeat(LAYERS, 1)
    old[:, -1] = -1
    assert torch.equal(rebalanced(policy, window(), old), rebalanced(policy, window()))


def test_another_process_plans_the_same(policy: Any, tmp_path: Path) -> None:
    load, old = window(), rebalanced(policy, window(7))
    torch.save((load, old), tmp_path / "in.pt")
    script = (
        "import sys, torch\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.distributed.eplb.policy import EPLB_POLICIES\n"
        f"load, old = torch.load({str(tmp_path / 'in.pt')!r})\n"
        f"new = EPLB_POLICIES['default'].rebalance_experts(load, {SLOTS}, 1, 1, {RANKS}, old)\n"
        f"torch.save(new, {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "out.pt"), rebalanced(policy, load, old))


@pytest.mark.parametrize(
    ("machine", "ranks", "reason"),
    [
        ("none.json", 8, "machine 'none.json' is neither a file nor one of"),
        ("", 8, "POISE_MACHINE is not set"),
        ("h200", 6, "6 ranks on a machine of 8 devices"),
    ],
)
def test_without_a_machine_that_fits_vllms_policy_decides_with_one_warning(
    machine: str,
    ranks: int,
    reason: str,
    plugged: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("POISE_MACHINE", machine)
    monkeypatch.setenv("POISE_SHAPE", "2048x768:bfloat16")
    policy = plugged()
    with caplog.at_level(logging.WARNING, logger="poise"):
        for seed in range(2):
            own = rebalanced(DefaultEplbPolicy, window(seed), ranks=ranks)
            assert torch.equal(rebalanced(policy, window(seed), ranks=ranks), own)
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("poise"))
    assert reason in warning


def test_the_loads_it_sees_are_logged_for_poise_place(
    plugged: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POISE_EXPERT_LOG", str(tmp_path / "log.safetensors"))
    policy = plugged()
    rebalanced(policy, torch.zeros((LAYERS, EXPERTS), dtype=torch.int32))
    assert list(tmp_path.iterdir()) == [], "a profile run is no load"
    rebalanced(policy, window(0))
    rebalanced(policy, window(1))
    read = read_statistics([tmp_path / "log.safetensors"])
    expected = torch.stack([window(0), window(1)]).double().numpy() / WINDOW
    assert np.allclose(read.load_NLE, expected, rtol=1e-6)
    assert not read.are_absolute
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.safetensors"]
