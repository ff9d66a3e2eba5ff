"""A widened checkpoint: the same logits and routing, written in little memory, or not written at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    HunYuanMoEV1Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from poise.errors import CheckpointError, UsageError
from poise.model.inspect import find_experts
from poise.model.random_checkpoint import make_checkpoint
from poise.model.widen import widen_checkpoint

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MOE = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen3": Qwen3MoeConfig(**SIZES, **MOE, num_experts=8, num_key_value_heads=2, head_dim=8),
    "qwen2": Qwen2MoeConfig(
        **SIZES, **MOE, num_experts=8, num_key_value_heads=2, shared_expert_intermediate_size=40, mlp_only_layers=[0]
    ),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=8, num_key_value_heads=2),
    "deepseek": DeepseekV3Config(
        **SIZES,
        **MOE,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=2,
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


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint in one file."""
    path = tmp_path_factory.mktemp("widen") / "qwen3"
    make_checkpoint(CONFIGS["qwen3"], path)
    return path


def run(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of random tokens in fp32, and the experts that each layer chose for each token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for experts in find_experts(model, "any"):
        module = model.get_submodule(experts.name)
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(-1).values))
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
    return logits, torch.stack(chosen)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_and_same_routing(name: str, tmp_path: Path) -> None:
    make_checkpoint(CONFIGS[name], tmp_path / "source", dtype="float32", skew=0.5)
    widen_checkpoint(tmp_path / "source", tmp_path / "wide", 8)
    logits, chosen = run(tmp_path / "source")
    wide_logits, wide_chosen = run(tmp_path / "wide")
    assert torch.equal(chosen, wide_chosen)
    assert (logits - wide_logits).abs().max() <= 1e-6 * logits.abs().max()


def test_bf16_weights_are_exact_copies(qwen3: Path, tmp_path: Path) -> None:
    widen_checkpoint(qwen3, tmp_path / "wide", 4)
    before, after = tensors(qwen3), tensors(tmp_path / "wide")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        copies = after[name]
        if ".experts." not in name:
            assert torch.equal(copies, tensor)
        elif "down_proj" in name:
            assert torch.equal(copies.unflatten(1, (-1, 4)) * 4, tensor[:, :, None].expand(-1, -1, 4))
        else:
            assert torch.equal(copies.unflatten(0, (-1, 4)), tensor[:, None].expand(-1, 4, -1))
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["moe_intermediate_size"] == 4 * 24


def test_shared_experts_widen_only_where_the_configuration_ties_them(tmp_path: Path) -> None:
    widths = {}
    for name in ("qwen2", "deepseek"):
        make_checkpoint(CONFIGS[name], tmp_path / name)
        widen_checkpoint(tmp_path / name, tmp_path / f"{name}-wide", 2)
        widths[name] = {
            key: t.shape[0]
            for key, t in tensors(tmp_path / f"{name}-wide").items()
            if "shared" in key and "up_proj" in key
        }
    assert set(widths["qwen2"].values()) == {40}
    assert set(widths["deepseek"].values()) == {2 * 2 * 24}


def test_shards_keep_an_expert_whole_and_in_name_order(qwen3: Path, tmp_path: Path) -> None:
    widen_checkpoint(qwen3, tmp_path / "wide", 2, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(file.name for file in (tmp_path / "wide").glob("*.safetensors"))
    assert files == sorted(set(index.values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    for name, file in index.items():
        if ".experts." in name:
            assert file == index[name.replace("gate_proj", "down_proj").replace("up_proj", "down_proj")]
    for file in files:
        raw = (tmp_path / "wide" / file).read_bytes()
        header_bytes = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + header_bytes])
        del header["__metadata__"]
        assert header_bytes % 8 == 0
        assert list(header) == sorted(header)
        assert all(index[name] == file for name in header)
    assert torch.equal(run(tmp_path / "wide")[1], run(qwen3)[1])


def test_factor_one_copies(qwen3: Path, tmp_path: Path) -> None:
    widen_checkpoint(qwen3, tmp_path / "copy", 1)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes()[-1000:] == (qwen3 / "model.safetensors").read_bytes()[
        -1000:
    ]
    before, after = tensors(qwen3), tensors(tmp_path / "copy")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_companions_and_progress(qwen3: Path, tmp_path: Path) -> None:
    source = shutil.copytree(qwen3, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("describes the source only")
    seen: list[tuple[int, int]] = []
    widen_checkpoint(source, tmp_path / "new" / "wide", 2, on_progress=lambda done, total: seen.append((done, total)))
    made = {file.name for file in (tmp_path / "new" / "wide").iterdir()}
    assert made == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors(tmp_path / "new" / "wide").values())


def test_an_interrupt_leaves_nothing(qwen3: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        widen_checkpoint(qwen3, tmp_path / "wide", 2, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", [0, -2, 3, 12])
def test_refuses_a_factor_that_is_no_power_of_two(factor: int, qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"factor {factor} .* choose 1, 2, 4"):
        widen_checkpoint(qwen3, tmp_path / "wide", factor)


def test_refuses_an_existing_target(qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="exists"):
        widen_checkpoint(qwen3, tmp_path / "mine", 2)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["keep"]


def test_refuses_more_than_the_disk_holds(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are free"):
        widen_checkpoint(qwen3, tmp_path / "wide", 2**34)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=8, num_key_value_heads=2, head_dim=8), "layout"),
        (HunYuanMoEV1Config(**SIZES, intermediate_size=24, num_experts=8, moe_topk=2, head_dim=8), "takes its width"),
    ],
)
def test_refuses_other_layouts(config: Any, message: str, tmp_path: Path) -> None:
    make_checkpoint(config, tmp_path / "source")
    with pytest.raises(CheckpointError, match=message) as caught:
        widen_checkpoint(tmp_path / "source", tmp_path / "wide", 2)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "wide").exists()


def test_refuses_what_does_not_divide_exactly_or_agree(qwen3: Path, tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["qwen3"], tmp_path / "half", dtype="float16")
    with pytest.raises(CheckpointError, match=r"is F16 .* convert"):
        widen_checkpoint(tmp_path / "half", tmp_path / "wide", 2)
    other = shutil.copytree(qwen3, tmp_path / "other")
    edit_config(other, moe_intermediate_size=25)
    with pytest.raises(CheckpointError, match=r"24 wide, but moe_intermediate_size in config\.json is 25"):
        widen_checkpoint(other, tmp_path / "wide", 2)
    assert not (tmp_path / "wide").exists()


def test_the_tool_refuses_bad_input_in_one_line_and_draws_no_bar(qwen3: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "widen.py"
    for source, factor, complaint in [(tmp_path, "2", "config.json is missing"), (qwen3, "3", "is not a power of two")]:
        argv = [sys.executable, str(tool), str(source), str(tmp_path / "wide"), "--factor", factor]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("widen: ")
        assert complaint in done.stderr
        assert done.stderr.count("\n") == 1


def test_memory_stays_small(tmp_path: Path) -> None:
    """Tensors of 64 MiB are written by a process that grows by less than 48 MiB."""
    width, hidden, factor = 1024, 2048, 16
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "any", "moe_intermediate_size": width}))
    up, down = torch.ones(width, hidden, dtype=torch.bfloat16), torch.ones(hidden, width, dtype=torch.bfloat16)
    expert = {f"mlp.experts.0.{name}.weight": up.clone() for name in ("gate_proj", "up_proj")}
    weights = {f"model.layers.0.{name}": t for name, t in (expert | {"mlp.experts.0.down_proj.weight": down}).items()}
    save_file(weights, tmp_path / "source" / "model.safetensors")
    script = f"""
from pathlib import Path
import torch
from poise.model.widen import widen_checkpoint

def memory(key):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))

torch.ones(1, 2).repeat_interleave(2, dim=1)
before = memory("VmRSS")
widen_checkpoint(Path({str(tmp_path / "source")!r}), Path({str(tmp_path / "wide")!r}), {factor})
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (tmp_path / "wide" / "model.safetensors").stat().st_size > 3 * width * hidden * 2 * factor
    assert int(done.stdout) < 48 * 1024
