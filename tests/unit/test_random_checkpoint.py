"""Checkpoints of random weights: the layout of published ones, the skew that was asked for, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from poise.errors import CheckpointError, UsageError
from poise.model.inspect import find_experts
from poise.model.random_checkpoint import make_checkpoint, zipf_shares

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
KEYS = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=8, num_key_value_heads=2),
    "qwen3": Qwen3MoeConfig(
        **SIZES, **KEYS, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "gpt-oss": GptOssConfig(**SIZES, **KEYS, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2),
    "granite": GraniteMoeConfig(
        **SIZES, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2
    ),
    "deepseek": DeepseekV3Config(
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
ON_DISK = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.7.w2.weight",
    "qwen3": "model.layers.0.mlp.experts.7.down_proj.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj_bias",
    "granite": "model.layers.0.block_sparse_moe.input_linear.weight",
}


def shapes(path: Path) -> dict[str, list[int]]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def measure_shares(path: Path) -> list[torch.Tensor]:
    """The share of other random tokens that choose each expert, most popular first, for each MoE layer."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    shares: list[torch.Tensor] = []
    for experts in find_experts(model, "any"):
        model.get_submodule(experts.name).register_forward_pre_hook(
            lambda _, args: shares.append(
                (torch.bincount(args[1].flatten(), minlength=8) / len(args[1])).sort(descending=True).values
            )
        )
    with torch.no_grad():
        model(torch.randint(2048, (16, 128), generator=torch.Generator().manual_seed(7)))
    return shares


@pytest.mark.parametrize("name", ON_DISK)
def test_layout_is_the_one_that_transformers_saves(name: str, tmp_path: Path) -> None:
    make_checkpoint(CONFIGS[name], tmp_path / "made")
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path / "saved")
    assert shapes(tmp_path / "made") == shapes(tmp_path / "saved")
    assert ON_DISK[name] in shapes(tmp_path / "made")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info.values())


def test_streamed_shards_make_the_same_model(tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["mixtral"], tmp_path / "one", skew=1.0, seed=3)
    make_checkpoint(CONFIGS["mixtral"], tmp_path / "many", skew=1.0, seed=3, max_shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 3
    assert set(index.values()) == {file.name for file in files}
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert one.keys() == many.keys() == index.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_seed_decides_everything_and_the_caller_keeps_his(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, config = torch.get_rng_state(), CONFIGS["qwen3"].to_dict()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(CONFIGS["qwen3"], tmp_path / name, seed=seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert torch.equal(state, torch.get_rng_state())
    assert config == CONFIGS["qwen3"].to_dict()


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_damping_concerns_what_is_added_to_the_hidden_states(name: str, tmp_path: Path) -> None:
    """Mixtral's files call the second projection of an expert w2."""
    for folder, damping in (("plain", 1.0), ("damped", 0.25)):
        make_checkpoint(CONFIGS[name], tmp_path / folder, damping=damping, seed=3)
    plain, damped = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "damped"))
    ratios = {key: damped[key].float().norm() / plain[key].float().norm() for key in plain}
    changed = {key for key, ratio in ratios.items() if ratio != 1.0}
    assert changed == {key for key in plain if key.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))}
    assert all(ratios[key] == pytest.approx(0.25, rel=1e-3) for key in changed)
    with pytest.raises(UsageError, match="damping 0"):
        make_checkpoint(CONFIGS[name], tmp_path / "none", damping=0.0)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek"])
def test_popularity_follows_the_skew(name: str, tmp_path: Path) -> None:
    wanted = zipf_shares(8, 2, 1.0)
    reached = make_checkpoint(CONFIGS[name], tmp_path / "skewed", skew=1.0)
    assert make_checkpoint(CONFIGS[name], tmp_path / "plain") == {}
    for shares in reached.values():
        assert (torch.tensor(shares) - wanted).abs().sum() / 2 / 2 < 0.02
    for shares_E in measure_shares(tmp_path / "skewed"):
        assert (shares_E - wanted).abs().sum() / 2 / 2 < 0.06
    for shares_E in measure_shares(tmp_path / "plain"):
        assert shares_E[0] < 0.5


def test_zipf_shares() -> None:
    assert torch.allclose(zipf_shares(8, 2, 0.0), torch.full((8,), 0.25))
    steep = zipf_shares(64, 8, 1.0)
    assert steep.sum().item() == pytest.approx(8, rel=1e-5)
    assert steep.max() <= 1
    assert torch.equal(steep, steep.sort(descending=True).values)
    assert (steep[10] / steep[20]).item() == pytest.approx(21 / 11, rel=1e-4)
    assert zipf_shares(4, 4, 3.0).tolist() == [1, 1, 1, 1]


def test_what_must_be_fp32_is(tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["deepseek"], tmp_path / "made", skew=1.0)
    weights = load_file(tmp_path / "made" / "model.safetensors")
    bias = weights.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert bias.std() > 0
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("skew", [-0.5, float("nan"), float("inf")])
def test_refuses_a_skew_that_is_no_exponent(skew: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose 0"):
        make_checkpoint(CONFIGS["mixtral"], tmp_path / "made", skew=skew)


def test_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int8' is not supported"):
        make_checkpoint(CONFIGS["mixtral"], tmp_path / "made", dtype="int8")
    with pytest.raises(CheckpointError, match="no experts"):
        make_checkpoint(LlamaConfig(**SIZES, intermediate_size=48), tmp_path / "made", skew=1.0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        make_checkpoint(CONFIGS["mixtral"], tmp_path / "mine")
    assert list(tmp_path.glob("**/*")) == [tmp_path / "mine"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_changes_settings(tool: Any, tmp_path: Path) -> None:
    CONFIGS["gpt-oss"].save_pretrained(tmp_path)
    config = tool.read_config(tmp_path, ["num_hidden_layers=1", "num_local_experts=4", "hidden_act=silu"])
    assert (config.num_hidden_layers, config.num_local_experts, config.hidden_act) == (1, 4, "silu")
    assert len(config.layer_types) == 1
    CONFIGS["qwen3"].save_pretrained(tmp_path)
    assert tool.read_config(tmp_path, ["num_experts=4"]).num_local_experts == 4
    with pytest.raises(UsageError, match="num_expert=4 names no setting"):
        tool.read_config(tmp_path / "config.json", ["num_expert=4"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        tool.read_config(tmp_path / "missing.json", [])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("num_hidden_layers=abc", "num_hidden_layers=abc is no number of layers; write one of at least 1"),
        ("num_hidden_layers=2.5", "num_hidden_layers=2.5 is no number of layers"),
        ("num_hidden_layers=0", "num_hidden_layers=0 is no number of layers"),
        ("hidden_size=abc", "--set hidden_size=abc makes no configuration: .*hidden_size"),
        ("layer_types=5", "--set layer_types=5 makes no configuration"),
        ("dtype=x", "--set dtype=x makes no configuration"),
    ],
)
def test_tool_refuses_a_setting_that_cannot_be_in_one_line(
    tool: Any, tmp_path: Path, setting: str, complaint: str
) -> None:
    CONFIGS["gpt-oss"].save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=complaint) as refusal:
        tool.read_config(tmp_path, [setting])
    assert "\n" not in str(refusal.value)
