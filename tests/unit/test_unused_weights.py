"""Weights for which config.json has no place: said once, in a line, unless transformers itself says to ignore them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise import LLM
from tests.conftest import MakeCheckpoint


@pytest.fixture
def root(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of its own for every test."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def add(root: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    file = root / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def test_layers_that_config_json_does_not_describe_are_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((root / "config.json").read_text())
    fewer = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1}
    (root / "config.json").write_text(json.dumps(config | fewer))
    LLM(root, memory="1GiB").close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"{root} holds weights of decoder layers that its config.json does not describe, such as "
    )
    assert "such as model.layers.1." in message
    assert "\n" not in message


def test_a_tensor_beside_those_of_a_layer_is_said_as_well(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(root, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    LLM(root, memory="1GiB").close()
    assert ["such as model.layers.0.self_attn.q_proj.bias" in record.getMessage() for record in caplog.records] == [
        True
    ]


def test_layers_that_transformers_itself_ignores_are_not_spoken_of(
    checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSeek-V3 is published with a layer for multi-token prediction behind the last."""
    root = Path(shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "model"))
    layer = {"eh_proj.weight": torch.zeros(64, 128), "mlp.experts.0.up_proj.weight": torch.zeros(32, 64)}
    add(root, {f"model.layers.61.{name}": tensor for name, tensor in layer.items()})
    LLM(root, memory="1GiB").close()
    assert not caplog.records
