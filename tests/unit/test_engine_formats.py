"""What engines record is read, and what they load is written: the layouts of SGLang 0.5.23, TensorRT-LLM and our own log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from poise.errors import PlacementError, TraceError
from poise.integrations.files import read_placement, read_statistics, write_placement
from poise.spec.placement import Placement, as_slots, contiguous
from poise.spec.statistics import ExpertStatistics, write_expert_log
from poise.spec.trace import RoutingTrace

LAYERS, EXPERTS = 3, 4
"""As SGLang counts: layer 0 is dense."""
MAP_LP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 0], [0, 1, 2, 3, 2, 2]])


def counts(*values: int) -> torch.Tensor:
    """(L, P) with a dense layer of zeros."""
    return torch.tensor([[0] * 6, list(values), [2 * value for value in values]], dtype=torch.int32)


def rank_file(path: Path, rank: int, *passes: tuple[int, torch.Tensor]) -> Path:
    records = [
        {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "global_physical_count": each}
        for number, each in passes
    ]
    torch.save({"records": records, "last_physical_to_logical_map": MAP_LP}, path)
    return path


def test_sglang_stat_leaves_out_what_its_circular_buffer_never_filled(tmp_path: Path) -> None:
    logical = torch.zeros((5, LAYERS, EXPERTS), dtype=torch.int32)
    logical[1, 1:] = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    logical[2, 1:] = torch.tensor([[3, 2, 1, 0], [1, 0, 1, 0]])
    file = tmp_path / "expert_distribution_recorder_1.5.pt"
    torch.save({"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None}, file)
    for paths in ([file], [tmp_path]):
        read = read_statistics(paths)
        assert (read.steps, read.layers, read.num_layers, read.are_absolute) == (2, (1, 2), 3, True)
        assert read.load_LE.tolist() == [[2, 2, 2, 2], [3, 3, 4, 4]]


def test_sglang_rank_files_are_summed_and_brought_to_logical_experts(tmp_path: Path) -> None:
    files = [
        rank_file(tmp_path / "a.pt", 0, (7, counts(1, 2, 3, 0, 0, 0)), (8, counts(1, 1, 1, 1, 1, 1))),
        rank_file(tmp_path / "b.pt", 1, (7, counts(0, 0, 0, 4, 5, 6)), (9, counts(0, 0, 0, 0, 0, 0))),
    ]
    read = read_statistics(files)
    assert read.layers == (1, 2)
    assert read.load_NLE[0].tolist() == [[4 + 6, 3, 2, 1 + 5], [2, 4, 6 + 10 + 12, 8]]
    assert read.load_NLE[1].tolist() == [[2, 1, 1, 2], [2, 2, 6, 2]]
    assert read.steps == 2, "a pass without tokens is none"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"x": 1}, "has neither logical_count nor records"),
        ({"logical_count": torch.zeros(2, 3, 4)}, "has no logical_count of whole numbers"),
        ({"logical_count": torch.zeros((2, 3, 4), dtype=torch.int32)}, "has counted no token"),
        ({"records": [], "last_physical_to_logical_map": MAP_LP}, "has counted no token"),
        ({"records": []}, "has no last_physical_to_logical_map of whole numbers"),
    ],
)
def test_other_content_is_refused(content: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TraceError) as refusal:
        read_statistics([tmp_path / "x.pt"])
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    torch.save({"logical_count": Payload(f"touch {tmp_path / 'ran'}")}, tmp_path / "evil.pt")
    with pytest.raises(TraceError, match="no file that torch can read safely"):
        read_statistics([tmp_path / "evil.pt"])
    assert not (tmp_path / "ran").exists()


def test_sglang_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = rank_file(tmp_path / "a.pt", 0, (7, counts(1, 2, 3, 4, 5, 6)))
    second = rank_file(tmp_path / "b.pt", 0, (7, counts(1, 2, 3, 4, 5, 6)))
    with pytest.raises(TraceError, match="a second file of rank 0"):
        read_statistics([first, second])
    torch.save({"logical_count": torch.ones((1, 3, 4), dtype=torch.int32)}, second)
    with pytest.raises(TraceError, match="of different recorder modes"):
        read_statistics([first, second])
    torch.save({"records": [], "last_physical_to_logical_map": MAP_LP.flip(1)}, second)
    with pytest.raises(TraceError, match=r"a.pt and b.pt have different maps"):
        read_statistics([first, second])
    second.write_bytes(b"nothing")
    with pytest.raises(TraceError, match="no file that torch can read safely"):
        read_statistics([second])


def trtllm(folder: Path, *ranks: dict[str, list[int]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2}))
    for rank, each in enumerate(ranks):
        tensors = {key: np.array(value, dtype=np.int32) for key, value in each.items()}
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


def test_tensorrt_llm_ranks_are_summed_by_iteration_and_layer(tmp_path: Path) -> None:
    folder = trtllm(
        tmp_path / "s",
        {"10_3": [1, 0, 0, 0], "10_4": [0, 0, 2, 0], "11_3": [1, 1, 1, 1], "11_4": [0, 0, 0, 4]},
        {"10_3": [0, 5, 0, 0], "10_4": [0, 0, 0, 1], "11_3": [1, 1, 1, 1], "11_4": [0, 0, 0, 4]},
    )
    save_file({"anything": np.zeros(3)}, folder / "rank0_raw.safetensors")
    read = read_statistics([folder])
    assert (read.layers, read.num_layers, read.steps) == ((3, 4), None, 2)
    assert read.load_NLE.tolist() == [[[1, 5, 0, 0], [0, 0, 2, 1]], [[2, 2, 2, 2], [0, 0, 0, 8]]]


def test_damaged_tensorrt_llm_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="lacks layer 4 of iteration 11"):
        read_statistics([trtllm(tmp_path / "a", {"10_3": [1] * 4, "10_4": [1] * 4, "11_3": [1] * 4})])
    with pytest.raises(TraceError, match=r"has '10_3' with the shape \(3,\)"):
        read_statistics([trtllm(tmp_path / "b", {"10_3": [1] * 3})])
    with pytest.raises(TraceError, match=r"has no rank0\.safetensors"):
        read_statistics([trtllm(tmp_path / "c")])
    (tmp_path / "c" / "meta_info.json").write_text('{"num_experts": "4"}')
    with pytest.raises(TraceError, match="num_experts '4'"):
        read_statistics([tmp_path / "c"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"has neither meta_info\.json"):
        read_statistics([tmp_path / "empty"])
    with pytest.raises(TraceError, match="do not exist"):
        read_statistics([tmp_path / "none"])


def test_traces_and_logs_are_told_apart(tmp_path: Path) -> None:
    trace = RoutingTrace(
        counts_NLE=np.array([[[1, 1], [2, 0]], [[3, 1], [0, 4]]], dtype=np.int32),
        model="m",
        top_k=1,
        layers=(4, 6),
        tokens_per_step=(2, 4),
    )
    trace.save(tmp_path / "t.safetensors")
    read = read_statistics([tmp_path / "t.safetensors"])
    assert (read.layers, read.are_absolute) == ((4, 6), True)
    assert read.load_LE.tolist() == [[2, 1], [1, 2]]

    load_NLE = np.array([[[0.5, 1.5], [2, 0]], [[0, 0], [0, 0]]], dtype=np.float32)
    write_expert_log(tmp_path / "l.safetensors", load_NLE, engine="vLLM", window_steps=1000)
    read = read_statistics([tmp_path / "l.safetensors"])
    assert (read.steps, read.layers, read.are_absolute) == (1, (0, 1), False)
    assert read.load_LE.tolist() == [[0.5, 1.5], [2, 0]]
    assert read.with_absolute_layers(3).layers == (3, 4)

    save_file({"load": load_NLE}, tmp_path / "x.safetensors")
    with pytest.raises(TraceError, match="write it with `poise record`"):
        read_statistics([tmp_path / "x.safetensors"])
    with pytest.raises(TraceError, match="2 statistics are given"):
        read_statistics([tmp_path / "t.safetensors", tmp_path / "l.safetensors"])


PLACEMENT = Placement(
    slot_to_expert_LS=as_slots([[3, 2, 1, 0, 0, 1], [0, 0, 1, 2, 3, 3]]), layers=(1, 2), num_experts=EXPERTS, ranks=2
)
STATISTICS = ExpertStatistics(load_NLE=np.ones((1, 2, EXPERTS)), layers=(1, 2), source="test", num_layers=4)


def test_sglang_gets_every_layer_and_no_other_key(tmp_path: Path) -> None:
    write_placement(PLACEMENT, tmp_path / "p.json", file_format="sglang", num_layers=4)
    content = json.loads((tmp_path / "p.json").read_text())
    dense = [0, 1, 2, 3, 0, 1]
    assert content == {"physical_to_logical_map": [dense, [3, 2, 1, 0, 0, 1], [0, 0, 1, 2, 3, 3], dense]}


def test_tensorrt_llm_gets_the_placed_layers_by_id(tmp_path: Path) -> None:
    write_placement(PLACEMENT, tmp_path / "p.yaml", file_format="trtllm", num_layers=None)
    assert yaml.safe_load((tmp_path / "p.yaml").read_text()) == {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {1: [3, 2, 1, 0, 0, 1], 2: [0, 0, 1, 2, 3, 3]},
    }


@pytest.mark.parametrize(("file_format", "name"), [("poise", "p.json"), ("sglang", "p.json"), ("trtllm", "p.yaml")])
def test_every_format_is_read_back(file_format: str, name: str, tmp_path: Path) -> None:
    write_placement(PLACEMENT, tmp_path / name, file_format=file_format, num_layers=4)
    read = read_placement(tmp_path / name, STATISTICS, ranks=2)
    assert np.array_equal(read.slot_to_expert_LS, PLACEMENT.slot_to_expert_LS)
    assert read.layers == (1, 2)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.json", "[]", "is no placement"),
        ("p.json", '{"physical_to_logical_map": [[0]], "x": 1}', "and nothing else"),
        ("p.json", '{"physical_to_logical_map": [[0, 1, 2, 3]]}', "has 1 layers and the statistics have layer 2"),
        ("p.json", '{"physical_to_logical_map": [[0], [0, 1], [0]]}', "different numbers of slots"),
        ("p.json", '{"physical_to_logical_map": [[0], [0, 1, 2, "a"], [0, 1, 2, 3]]}', "no expert's number"),
        ("p.yaml", "initial_global_assignments: {1: [0, 1, 2, 3]}", "does not place layer 2"),
        ("p.yaml", "num_slots: 8", "has no initial_global_assignments"),
        ("p.yaml", "a: [", "is not YAML"),
    ],
)
def test_current_placements_that_do_not_fit_are_refused(name: str, text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PlacementError) as refusal:
        read_placement(tmp_path / name, STATISTICS, ranks=2)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_an_engine_would_not_load_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"name a file that ends in .json"):
        write_placement(PLACEMENT, tmp_path / "p", file_format="sglang", num_layers=4)
    with pytest.raises(PlacementError, match="the model has 2 layers and layer 2 is placed"):
        write_placement(PLACEMENT, tmp_path / "p.json", file_format="sglang", num_layers=2)
    contiguous((0, 1), num_experts=4, ranks=2, slots_per_rank=3).save(tmp_path / "other.json")
    with pytest.raises(PlacementError, match=r"is for layers \(0, 1\); asked for are \(1, 2\)"):
        read_placement(tmp_path / "other.json", STATISTICS, ranks=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.json"]
