"""Writes tiny checkpoints in the layouts of published quantised models, and the plain ones that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from poise.model.dequantise import MXFP4_GROUP

WEIGHTS = "model.safetensors"
FP8_MAX = 448.0
NOT_CONVERTED = ("embed_tokens", "lm_head", "norm", "gate.weight", "router")
"""What published fp8 checkpoints leave alone. Routers too: ``mlp.gate`` is one, ``gate_proj`` is none."""
Tensors = dict[str, torch.Tensor]


def write_fp8(
    source: Path, target: Path, *, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.float32
) -> Path:
    """DeepSeek-V3 and Qwen3-FP8: matrices as F8_E4M3, ``weight_scale_inv`` with a number per block."""
    quantised: Tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if weight.dim() != 2 or any(part in name for part in NOT_CONVERTED):
            quantised[name] = weight
        else:
            quantised[name], quantised[f"{name}_scale_inv"] = to_fp8(weight, block, scale_dtype)
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}
    return write(source, target, quantised, config | {"modules_to_not_convert": ["lm_head"]})


def to_fp8(
    weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a matrix; blocks at its ends are smaller where its sides are no multiples."""
    (rows, columns), (high, wide) = weight.shape, block
    padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide)
    padded[:rows, :columns] = weight
    blocks = padded.view(-(-rows // high), high, -(-columns // wide), wide)
    scales = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp(min=1e-12).to(scale_dtype)
    values = (blocks / scales.float()[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return values.reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn), scales


def from_fp8(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The definition: each value times the scale of its block, in fp32, rounded once."""
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (values.float() * wide).to(dtype)


def write_plain_twin_of_fp8(source: Path, target: Path, block: tuple[int, int], dtype: torch.dtype) -> Path:
    """An fp8 checkpoint's unquantised twin."""
    tensors = load_file(source / WEIGHTS)
    plain = {
        name: from_fp8(tensor, tensors[f"{name}_scale_inv"], block, dtype)
        if f"{name}_scale_inv" in tensors
        else tensor.to(dtype)
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    return write(source, target, plain, None)


def write_mxfp4(source: Path, target: Path, *, seed: int = 0) -> Path:
    """GPT-OSS: experts as ``_blocks`` (two 4-bit values a byte) and ``_scales``, drawn at random; all else as it was."""
    generator = torch.Generator().manual_seed(seed)
    quantised: Tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            quantised[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // MXFP4_GROUP)
        quantised[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        quantised[f"{name}_scales"] = torch.randint(119, 124, shape, dtype=torch.uint8, generator=generator)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return write(source, target, quantised, {"quant_method": "mxfp4", "modules_to_not_convert": left})


def write(source: Path, target: Path, tensors: Tensors, quantisation: dict[str, Any] | None) -> Path:
    """A copy of a checkpoint with other tensors and another ``quantization_config``."""
    shutil.copytree(source, target)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (target / "config.json").write_text(json.dumps(config))
    return target


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Changes the tensors of a checkpoint in place."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def change_config(path: Path, **values: Any) -> None:
    """Changes ``quantization_config`` in place."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= values
    (path / "config.json").write_text(json.dumps(config))
