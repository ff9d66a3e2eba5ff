"""`poise place` end to end: statistics of every engine in, a placement that loads again out, and what it says of its worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from poise.cli import main
from poise.spec.bundled import find_machine
from poise.spec.placement import Placement
from poise.spec.statistics import write_expert_log
from poise.spec.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, TOKENS, STEPS = 3, 32, 4, 1024, 12
SHAPE = ("--shape", "2048x768:bfloat16")


def skewed_counts() -> Any:
    rng = np.random.default_rng(0)
    share_LE = rng.permuted(0.9 ** np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    share_LE /= share_LE.sum(axis=1, keepdims=True)
    return rng.multinomial(TOKENS * TOP_K, share_LE, size=(STEPS, LAYERS)).astype(np.int32)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.safetensors"
    RoutingTrace(
        counts_NLE=skewed_counts(), model="m", top_k=TOP_K, layers=(1, 2, 3), tokens_per_step=(TOKENS,) * STEPS
    ).save(file)
    return file


def place(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as end:
        main(["place", *map(str, arguments)])
    shown = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, shown.out, shown.err


def test_a_placement_is_predicted_written_drawn_and_then_left(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--trace", trace, "--machine", "spread-22", "--ranks", 8, *SHAPE)
    page, file = tmp_path / "p.html", tmp_path / "p.json"
    code, shown, notes = place([*common, "--slots-per-rank", 5, "--output", file, "--report", page, "--json"], capsys)
    assert code == 0
    said = json.loads(shown)
    assert said["now_s"] > said["planned_s"] >= said["bound_s"] > 0
    assert said["planned_s"] <= said["token_balanced_s"]
    assert said["now_s"] == pytest.approx(sum(layer["now_s"] for layer in said["layers"]))
    assert [layer["layer"] for layer in said["layers"]] == [1, 2, 3]
    assert said["is_worth_it"] is True
    assert said["moves"] is None
    assert notes.splitlines() == [f"poise: wrote {file}", f"poise: wrote {page}"]
    written = Placement.load(file)
    assert (written.layers, written.ranks, written.slots_per_rank) == ((1, 2, 3), 8, 5)
    assert "layer 3" in page.read_text()

    code, shown, _ = place([*common, "--current", file, "--json"], capsys)
    again = json.loads(shown)
    assert (code, again["slots_per_rank"], again["now"], again["is_worth_it"]) == (0, 5, "current", False)
    assert again["now_s"] == pytest.approx(said["planned_s"])
    code, shown, _ = place([*common, "--current", file], capsys)
    assert "Leave it: gain" in shown
    assert "95 % interval, at least 1 %" in shown


def test_moves_and_their_bytes_are_counted_and_limited(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--trace", trace, "--machine", "one-slow", "--ranks", 8, *SHAPE, "--json")
    start = tmp_path / "start.json"
    rows = [{"layer": layer, "slot_to_expert": list(range(EXPERTS))} for layer in (1, 2, 3)]
    start.write_text(
        json.dumps({"version": 1, "experts": EXPERTS, "ranks": 8, "slots_per_rank": 4, "layers": rows}),
        encoding="utf-8",
    )
    said = json.loads(place([*common, "--current", start], capsys)[1])
    assert said["moves"] > 0
    assert said["moved_bytes"] == said["moves"] * 3 * 2048 * 768 * 2
    assert said["is_worth_it"]
    assert "each saves 0.05% of its layer's time or more" in place([*common[:-1], "--current", start], capsys)[1]
    none = json.loads(place([*common, "--current", start, "--max-moves", 0], capsys)[1])
    assert (none["moves"], none["is_worth_it"]) == (0, False)
    assert none["planned_s"] == pytest.approx(said["now_s"])


def test_a_machine_is_used_in_part(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = place(["--trace", trace, "--machine", "one-slow", "--ranks", 4, *SHAPE], capsys)
    assert code == 0
    assert "Of the machine's 8 devices the first 4 are used." in shown
    said = json.loads(place(["--trace", trace, "--machine", "one-slow", "--ranks", 4, *SHAPE, "--json"], capsys)[1])
    equal = json.loads(place(["--trace", trace, "--machine", "h200", "--ranks", 4, *SHAPE, "--json"], capsys)[1])
    assert said["planned_s"] == pytest.approx(equal["planned_s"]), "the slow device is the last"


def test_groups_of_experts_stay_on_a_node(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    groups = ("--ranks-per-node", 4, "--expert-groups", 4)
    code, _, _ = place(
        ["--trace", trace, "--machine", "spread-22", "--ranks", 8, *SHAPE, *groups, "--output", file], capsys
    )
    assert code == 0
    by_node = Placement.load(file).slot_to_expert_LS.reshape(LAYERS, 2, -1) // (EXPERTS // 4)
    for first, second in by_node.tolist():
        assert not set(first) & set(second)
        assert len(set(first)) == 2


def test_statistics_of_sglang_become_its_expert_location(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logical = torch.zeros((20, LAYERS + 1, EXPERTS), dtype=torch.int32)
    logical[:STEPS, 1:] = torch.from_numpy(skewed_counts())
    dump = tmp_path / "expert_distribution_recorder_1.pt"
    torch.save({"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None}, dump)
    arguments = (
        "--trace",
        dump,
        "--machine",
        "h200",
        "--ranks",
        8,
        *SHAPE,
        "--slots-per-rank",
        5,
        "--format",
        "sglang",
    )
    code, shown, _ = place([*arguments, "--output", tmp_path / "location.json"], capsys)
    assert code == 0
    assert "SGLang stat, 12 steps" in " ".join(shown.split())
    content = json.loads((tmp_path / "location.json").read_text())
    assert list(content) == ["physical_to_logical_map"]
    assert [len(row) for row in content["physical_to_logical_map"]] == [40] * 4
    assert all(set(row) == set(range(EXPERTS)) for row in content["physical_to_logical_map"])


def test_a_vllm_log_needs_its_first_layer_and_then_becomes_tensorrt_llm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.safetensors"
    write_expert_log(log, skewed_counts().astype(np.float32), engine="vLLM", window_steps=1000)
    common = ["--trace", log, "--machine", "h200", "--ranks", 8, *SHAPE, "--format", "trtllm"]
    code, _, complaint = place([*common, "--output", tmp_path / "p.yaml"], capsys)
    assert code == 2
    assert "the vLLM expert log counts MoE layers only; say with --first-layer" in complaint
    assert not (tmp_path / "p.yaml").exists()
    code, _, _ = place([*common, "--output", tmp_path / "p.yaml", "--first-layer", 3], capsys)
    assert code == 0
    assert list(yaml.safe_load((tmp_path / "p.yaml").read_text())["initial_global_assignments"]) == [3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ranks", 12), "12 ranks on a machine of 8 devices; give a multiple of 8"),
        (("--ranks", 100000), "--ranks is 100000; it must be from 1 to 512"),
        (("--ranks", 8, "--expert-groups", 4), "expert_groups needs ranks_per_node"),
        (("--ranks", 8, "--ranks-per-node", 3), "ranks_per_node is 3; it must divide the 8 ranks"),
        (("--ranks", 8, "--slots-per-rank", 3), "give at least 4 slots per rank"),
        (("--ranks", 8, "--max-moves", 3), "max_moves needs the current placement"),
        (("--ranks", 8, "--current", "none.json"), "placement none.json cannot be read"),
        (("--ranks", 8, "--output", "p", "--format", "sglang"), "name a file that ends in .json"),
        (("--ranks", 8, "--output", "p", "--report", "p"), "name the same file p; give two names"),
    ],
)
def test_what_cannot_be_placed_is_one_line(
    arguments: Sequence[object],
    complaint: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, said = place(["--trace", trace, "--machine", "h200", *SHAPE, *arguments], capsys)
    assert (code, shown) == (2, "")
    assert complaint in said
    assert len(said.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.safetensors"]


def test_a_machine_of_one_shape_needs_no_choice(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = find_machine("h100").to_json()
    for device in content["devices"]:
        device["curves"] = device["curves"][:1]
    (tmp_path / "m.json").write_text(json.dumps(content))
    code, shown, _ = place(["--trace", trace, "--machine", tmp_path / "m.json", "--ranks", 8, "--json"], capsys)
    assert code == 0
    assert json.loads(shown)["shape"] == "2048 x 512 bfloat16"
