"""SGLang 0.5.23's own code on the other side: its recorder writes what is read, its loader reads what is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig

pytest.importorskip("sglang", reason="SGLang is not installed: `make test-engines` installs it")

# SGLang imports torchvision. Beside torch for CPUs its library does not load, and without the names of the operators in there
# the package does not; so it lies where only this file finds it.
sys.path.append(str(Path(sys.prefix) / "torchvision"))
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.eplb import expert_distribution as distribution
from sglang.srt.eplb.expert_location import compute_initial_expert_location_metadata
from sglang.srt.runtime_context import get_context

from poise.integrations.files import read_statistics, write_placement
from poise.spec.placement import Placement, as_slots

LAYERS, EXPERTS, RANKS, SLOTS, TOP_K = 3, 16, 4, 20, 2
"""Layer 0 gets no token, as a dense layer."""
PLACEMENT = Placement(
    slot_to_expert_LS=as_slots([[(3 * slot + layer) % EXPERTS for slot in range(SLOTS)] for layer in (1, 2)]),
    layers=(1, 2),
    num_experts=EXPERTS,
    ranks=RANKS,
)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one: the recorder sums over it."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """SGLang's configuration of a small Qwen3-MoE."""
    config = Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=64,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return ModelConfig(str(tmp_path / "model"))


def served(**options: Any) -> Any:
    """SGLang configured as its command line would: expert parallel over 4 ranks with 4 redundant experts, on the CPU."""
    common = {"device": "cpu", "tp_size": RANKS, "ep_size": RANKS, "ep_num_redundant_experts": SLOTS - EXPERTS}
    return get_context().override_server_args(**common, **options)


def location(model: Any, tmp_path: Path) -> Any:
    """Our placement through SGLang's own --init-expert-location."""
    file = tmp_path / "location.json"
    write_placement(PLACEMENT, file, file_format="sglang", num_layers=LAYERS)
    with served(init_expert_location=str(file)):
        return compute_initial_expert_location_metadata(model, moe_ep_rank=0)


def test_sglang_loads_the_placement(model: Any, tmp_path: Path) -> None:
    found = location(model, tmp_path)
    assert (found.num_layers, found.num_logical_experts, found.ep_size) == (LAYERS, EXPERTS, RANKS)
    assert found.num_local_physical_experts == PLACEMENT.slots_per_rank
    assert np.array_equal(found.physical_to_logical_map_cpu[1:].numpy(), PLACEMENT.slot_to_expert_LS)
    for expert in range(EXPERTS):
        slots = found.logical_to_all_physical(2, expert)
        assert sorted(slots) == np.flatnonzero(PLACEMENT.slot_to_expert_LS[1] == expert).tolist()


def chosen_slots(passes: int, tokens: int = 50) -> torch.Tensor:
    """Physical experts, (passes, layers 1 and 2, tokens, k)."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, SLOTS, (passes, 2, tokens, TOP_K)))


def logical_counts(chosen: torch.Tensor) -> np.ndarray[Any, Any]:
    counts_NLE = np.zeros((len(chosen), 2, EXPERTS), dtype=np.int64)
    for step, layer in np.ndindex(counts_NLE.shape[:2]):
        np.add.at(counts_NLE[step, layer], PLACEMENT.slot_to_expert_LS[layer][chosen[step, layer].flatten().numpy()], 1)
    return counts_NLE


def record(metadata: Any, rank: int, chosen: torch.Tensor) -> None:
    """A server's rank that records these passes and dumps."""
    recorder = distribution._ExpertDistributionRecorderReal(metadata, rank)
    recorder._accumulator._first_dump = False  # else it empties a cache that only GPUs have
    recorder.start_record()
    tokens = chosen.shape[2]
    batch = SimpleNamespace(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(tokens),
        extend_seq_lens_cpu=[tokens],
        forward_mode=distribution.ForwardMode.EXTEND,
    )
    for number, chosen_LTK in enumerate(chosen):
        with recorder.with_forward_pass(number, batch):
            for layer in (1, 2):
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(topk_ids=chosen_LTK[layer - 1].to(torch.int32))
    recorder.stop_record()
    recorder.dump_record()


@pytest.fixture
def dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where SGLang's recorder puts its files; it counts on the CPU."""
    monkeypatch.setattr(distribution, "get_device", lambda: "cpu")  # its own asks for an accelerator
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path / "dumps"))
    return tmp_path / "dumps"


@pytest.mark.parametrize(("buffer", "passes", "kept"), [(8, 3, slice(0, 3)), (4, 6, slice(2, 6)), (-1, 3, slice(0, 3))])
def test_stat_dumps_are_read(buffer: int, passes: int, kept: slice, model: Any, tmp_path: Path, dumps: Path) -> None:
    metadata, chosen = location(model, tmp_path), chosen_slots(passes)
    with served(expert_distribution_recorder_mode="stat", expert_distribution_recorder_buffer_size=buffer):
        record(metadata, 0, chosen)
    (dump,) = dumps.iterdir()
    for read in (read_statistics([dump]), read_statistics([dumps])):
        assert (read.source, read.layers, read.num_layers) == ("SGLang stat", (1, 2), LAYERS)
        assert np.array_equal(read.load_LE, logical_counts(chosen[kept]).mean(axis=0))


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_rank_files_are_read(mode: str, model: Any, tmp_path: Path, dumps: Path) -> None:
    metadata, chosen = location(model, tmp_path), chosen_slots(4)
    with served(expert_distribution_recorder_mode=mode, chunked_prefill_size=64):
        record(metadata, 0, chosen[:, :, :30])
        record(metadata, 1, chosen[:, :, 30:])
    assert len(os.listdir(dumps)) == 2
    read = read_statistics([dumps])
    assert (read.steps, read.layers, read.num_layers) == (4, (1, 2), LAYERS)
    assert np.array_equal(read.load_NLE, logical_counts(chosen))
