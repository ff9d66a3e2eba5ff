"""Quantised checkpoints that are damaged or of another kind: one line names the tensor, or the key of the configuration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.errors import CheckpointError
from tests.conftest import MakeCheckpoint
from tests.quantised_checkpoints import Tensors, change_config, change_tensors, write_fp8, write_mxfp4

Damage = Callable[[Path], object]

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


def refusal_of(path: Path, **options: Any) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(CheckpointError) as refusal:
        LLM(path, memory="1GiB", **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def put(**tensors: torch.Tensor | None) -> Damage:
    """Replaces the tensors ``expert``, ``scale_inv``, ``blocks``, ``scales``, or takes them away."""
    names = {"expert": EXPERT, "scale_inv": f"{EXPERT}_scale_inv", "blocks": BLOCKS, "scales": SCALES}

    def change(now: Tensors) -> None:
        for key, tensor in tensors.items():
            now.pop(names[key])
            if tensor is not None:
                now[names[key]] = tensor

    return lambda path: change_tensors(path, change)


def declare(**values: Any) -> Damage:
    """Changes ``quantization_config``."""
    return lambda path: change_config(path, **values)


FP8_CASES = {
    "no scales": (put(scale_inv=None), r"fp8 tensor \S+experts\.3\.up_proj\.weight has no \S+weight_scale_inv"),
    "scales of another shape": (
        put(scale_inv=torch.ones(2, 2)),
        r"up_proj\.weight_scale_inv is F32 \[2, 2\]; .*\[1, 1\]",
    ),
    "one scale for all": (put(scale_inv=torch.ones(())), r"up_proj\.weight_scale_inv is F32 \[\]"),
    "scales of another dtype": (put(scale_inv=torch.ones(1, 1).to(torch.int32)), r"weight_scale_inv is I32"),
    "scales without values": (put(expert=torch.ones(32, 64)), r"up_proj\.weight_scale_inv scales no fp8 tensor"),
    "nothing": (put(expert=None), r"up_proj\.weight_scale_inv scales no fp8 tensor"),
    "e5m2": (put(expert=torch.ones(32, 64).to(torch.float8_e5m2), scale_inv=None), r"F8_E5M2 without scales of fp8"),
    "int8": (put(expert=torch.ones(32, 64).to(torch.int8), scale_inv=None), r"up_proj\.weight is I8 without scales"),
    "values of another shape": (
        put(expert=torch.ones(16, 64).to(torch.float8_e4m3fn)),
        r"up_proj\.weight \[16, 64\]: config\.json asks for \[64, 64\]",
    ),
    "another method": (declare(quant_method="awq"), r"quantization_config 'awq', which is not supported"),
    "a method of no name": (declare(quant_method=None), r"quantization_config 'unnamed', which is not supported"),
    "static activations": (declare(activation_scheme="static"), r"'fp8' with activation_scheme 'static'"),
    "another format": (declare(fmt="e5m2"), r"'fp8' with fmt 'e5m2'"),
    "fp4 experts": (declare(expert_dtype="fp4"), r"'fp8' with expert_dtype 'fp4'"),
    "an unknown key": (declare(kv_cache_scheme={"type": "float"}), r"'fp8' with kv_cache_scheme"),
    "no blocks": (declare(weight_block_size=None), r"weight_block_size None"),
    "blocks of one number": (declare(weight_block_size=[128]), r"weight_block_size \[128\]"),
    "blocks of nothing": (declare(weight_block_size=[0, 128]), r"weight_block_size \[0, 128\]"),
    "MXFP4 declared": (declare(quant_method="mxfp4"), r"'mxfp4' with activation_scheme"),
}
MXFP4_CASES = {
    "no scales": (put(scales=None), r"down_proj_blocks has no \S+down_proj_scales"),
    "no blocks": (put(blocks=None), r"down_proj_scales scales no mxfp4 tensor"),
    "scales of another shape": (
        put(scales=torch.ones(4, 64, 2).byte()),
        r"down_proj_scales U8 \[4, 64, 2\]; MXFP4 needs",
    ),
    "scales as numbers": (put(scales=torch.ones(4, 64, 3)), r"down_proj_scales F32"),
    "groups of another size": (put(blocks=torch.ones(4, 64, 3, 8).byte()), r"down_proj_blocks is U8 \[4, 64, 3, 8\]"),
    "fewer experts": (
        put(blocks=torch.ones(3, 64, 3, 16).byte(), scales=torch.ones(3, 64, 3).byte()),
        r"down_proj has shape \[3, 96, 64\]; config\.json asks for 4 experts",
    ),
    "another width": (
        put(blocks=torch.ones(4, 64, 2, 16).byte(), scales=torch.ones(4, 64, 2).byte()),
        r"down_proj\[0\] \[64, 64\]: config\.json asks for \[96, 64\]",
    ),
    "an unknown key": (declare(bits=4), r"'mxfp4' with bits 4"),
}


@pytest.mark.parametrize(("damage", "pattern"), FP8_CASES.values(), ids=FP8_CASES)
def test_a_damaged_fp8_checkpoint_is_refused_by_name(
    damage: Damage, pattern: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = write_fp8(checkpoint("qwen3_moe", "bfloat16"), tmp_path / "fp8")
    damage(path)
    assert re.search(pattern, refusal_of(path))


@pytest.mark.parametrize(("damage", "pattern"), MXFP4_CASES.values(), ids=MXFP4_CASES)
def test_a_damaged_mxfp4_checkpoint_is_refused_by_name(
    damage: Damage, pattern: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = write_mxfp4(checkpoint("gpt_oss", "bfloat16"), tmp_path / "mxfp4")
    damage(path)
    assert re.search(pattern, refusal_of(path))


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantisation_that_is_declared_and_not_there(method: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    root = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    assert re.search(rf"declares quantization_config '{method}' and holds no tensor of that kind", refusal_of(root))


def test_a_quantisation_that_is_there_and_not_declared(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = write_mxfp4(checkpoint("gpt_oss", "bfloat16"), tmp_path / "mxfp4")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "quantization_config"}))
    assert "holds nothing for model.layers.0.mlp.experts" in refusal_of(path, dtype="bfloat16")


def test_an_fp8_tensor_that_is_wider_than_its_declared_dtype_runs_in_what_the_user_asks(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = write_fp8(checkpoint("qwen3_moe", "bfloat16"), tmp_path / "fp8")
    for dtype, found in (("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")):
        with LLM(path, memory="1GiB", dtype=dtype) as llm:
            assert llm.spec.dtype == found
            assert (
                len(
                    llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=4, ignore_eos=True))[0]
                    .outputs[0]
                    .token_ids
                )
                == 4
            )
