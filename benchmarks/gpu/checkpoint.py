"""A checkpoint in Mixtral-8x7B's shape with fewer layers, random weights and skewed routing, made on the GPU in seconds.

Every layer has its own random weights. Embeddings have a direction in common, which a router's rows hold more or less of, so
that a layer's i-th most popular expert is wanted as by Zipf's law, about; which expert that is differs from layer to layer.
Experts and attention add little to the residual stream, or the direction would be lost in the noise of the layers before; the
head does not see it, or all rows would go on with the same token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import MixtralConfig

Tensors = dict[str, torch.Tensor]
SKEW = 0.8
"""Exponent of Zipf's law that the logits of the routers follow, before the top two are taken."""


def config_of(layers: int, divide: int = 1) -> MixtralConfig:
    """Mixtral-8x7B but for the number of layers, all widths divided by ``divide``."""
    return MixtralConfig(
        vocab_size=32000 // divide,
        hidden_size=4096 // divide,
        intermediate_size=14336 // divide,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rope_theta=1e6,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )


def write(directory: Path, config: MixtralConfig, device: torch.device, *, seed: int = 0) -> None:
    """A shard for each layer, and one for the rest; threads write while the next are drawn."""
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    direction_H = torch.randn(config.hidden_size, generator=generator, device=device)
    direction_H /= direction_H.norm()
    names: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        writes = []
        for place, tensors in enumerate(_shards(config, direction_H, generator)):
            shard = f"model-{place:05d}.safetensors"
            names |= dict.fromkeys(tensors, shard)
            writes.append(pool.submit(_write_shard, directory / shard, {n: t.cpu() for n, t in tensors.items()}))
        for each in writes:
            each.result()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config.save_pretrained(directory)


def _shards(config: MixtralConfig, direction_H: torch.Tensor, generator: torch.Generator) -> Iterator[Tensors]:
    hidden, inner, device = config.hidden_size, config.intermediate_size, direction_H.device

    def noise(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=std, generator=generator)

    ones = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    embedding = noise(config.vocab_size, hidden, std=1.0) + (math.sqrt(hidden) * direction_H).bfloat16()
    head = noise(config.vocab_size, hidden, std=0.02)
    head -= (head.float() @ direction_H)[:, None].bfloat16() * direction_H.bfloat16()
    yield {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ones,
        "lm_head.weight": head,
    }
    key_width = hidden // config.num_attention_heads * config.num_key_value_heads
    experts = config.num_local_experts
    wanted_E = -SKEW * torch.arange(1, experts + 1, device=device).log() * math.sqrt(2.0 / hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        order_E = torch.randperm(experts, generator=generator, device=device)
        router = noise(experts, hidden, std=0.02) + (wanted_E[order_E, None] * direction_H).bfloat16()
        tensors = {
            f"{at}input_layernorm.weight": ones,
            f"{at}post_attention_layernorm.weight": ones,
            f"{at}block_sparse_moe.gate.weight": router,
        }
        shapes = {"q": (hidden, hidden), "k": (key_width, hidden), "v": (key_width, hidden), "o": (hidden, hidden)}
        for name, shape in shapes.items():
            tensors[f"{at}self_attn.{name}_proj.weight"] = noise(*shape, std=0.002 if name == "o" else 0.02)
        for expert in range(experts):
            for name, shape, std in (
                ("w1", (inner, hidden), 0.02),
                ("w2", (hidden, inner), 0.002),
                ("w3", (inner, hidden), 0.02),
            ):
                tensors[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = noise(*shape, std=std)
        yield tensors


def _write_shard(path: Path, tensors: Tensors) -> None:
    """As safetensors lays a file out; its own writer would copy everything once more."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
