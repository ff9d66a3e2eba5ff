"""A Qwen3-MoE checkpoint as one GGUF file for llama.cpp, the same weights bit for bit: experts stacked, norms and routers fp32.

What llama.cpp's own converter writes for this architecture (``Qwen3MoeModel`` in convert_hf_to_gguf.py), tensor by tensor, so
that memory holds one stacked tensor. There is no vocabulary in it: prompts are token ids. llama.cpp always renormalises the
chosen experts' weights, so a configuration that does not is refused, as is every other architecture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.errors import CheckpointError, UsageError
from poise.model.checkpoint import Checkpoint, TensorRef, open_checkpoint
from poise.model.inspect import load_config

GET_PEERS = (
    "llama.cpp is not installed; pip install 'poise[peers]' builds it (about ten minutes, a C++ compiler needed)"
)
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
_EXPERT = {"gate_proj": "ffn_gate_exps.weight", "up_proj": "ffn_up_exps.weight", "down_proj": "ffn_down_exps.weight"}
_ALWAYS_FLOAT32 = ("norm.weight", "ffn_gate_inp.weight")
_DTYPES = {"BF16": ("BF16", np.uint16), "F16": ("F16", np.float16), "F32": ("F32", np.float32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """A tensor of the GGUF file: ``parts`` of the checkpoint one behind the other, in ``dtype`` ("F32" is converted to)."""

    name: str
    parts: tuple[TensorRef, ...]
    shape: tuple[int, ...]
    dtype: str


def plan_tensors(checkpoint: Checkpoint, config: Any) -> list[Stacked]:
    """Every tensor of the GGUF file, in file order. Raises CheckpointError for a tensor that is missing or left over."""
    left = dict(checkpoint.tensors)

    def take(source: str) -> TensorRef:
        if source not in left:
            raise CheckpointError(f"{checkpoint.path} has no tensor {source}; it is no whole Qwen3-MoE checkpoint")
        return left.pop(source)

    def single(source: str, name: str) -> Stacked:
        part = take(source)
        dtype = "F32" if name.endswith(_ALWAYS_FLOAT32) else part.dtype
        return Stacked(name=name, parts=(part,), shape=part.shape, dtype=dtype)

    outside = {source: name for source, name in _OUTSIDE.items() if source != "lm_head.weight" or source in left}
    planned = [single(source, name) for source, name in outside.items()]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        planned += [single(f"{prefix}.{source}", f"blk.{layer}.{name}") for source, name in _IN_LAYER.items()]
        for matrix, name in _EXPERT.items():
            experts = range(config.num_experts)
            parts = tuple(take(f"{prefix}.mlp.experts.{expert}.{matrix}.weight") for expert in experts)
            shape = (len(parts), *parts[0].shape)
            planned.append(Stacked(name=f"blk.{layer}.{name}", parts=parts, shape=shape, dtype=parts[0].dtype))
    if left:
        raise CheckpointError(
            f"{checkpoint.path} has tensors that GGUF has no place for: {', '.join(sorted(left)[:3])}"
        )
    return planned


def write_gguf(source: Path, target: Path) -> None:
    """Writes ``target`` from the checkpoint in ``source``, whole or not at all.

    Raises CheckpointError for a checkpoint that llama.cpp would compute differently, UsageError where gguf is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ModuleNotFoundError:
        raise UsageError(GET_PEERS) from None
    checkpoint = open_checkpoint(source)
    config = load_config(checkpoint)
    _refuse_what_differs(checkpoint, config)
    planned = plan_tensors(checkpoint, config)
    partial = target.with_name(f".{target.name}.partial")
    try:
        writer = GGUFWriter(partial, "qwen3moe")
        _describe(writer, config)
        for tensor in planned:
            kind, item = _DTYPES[tensor.dtype]
            nbytes = int(np.prod(tensor.shape)) * np.dtype(item).itemsize
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(item), nbytes, raw_dtype=GGMLQuantizationType[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_values(tensor))
        writer.close()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_what_differs(checkpoint: Checkpoint, config: Any) -> None:
    is_other = config.model_type != "qwen3_moe"
    differing = {
        "model_type": is_other,
        "norm_topk_prob": not is_other and not config.norm_topk_prob,
        "mlp_only_layers": not is_other and bool(config.mlp_only_layers),
        "decoder_sparse_step": not is_other and config.decoder_sparse_step != 1,
        "attention_bias": not is_other and config.attention_bias,
        "use_sliding_window": not is_other and config.use_sliding_window,
        "rope_type": not is_other and config.rope_parameters["rope_type"] != "default",
    }
    wrong = [name for name, differs in differing.items() if differs]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: llama.cpp's Qwen3-MoE does not compute this {', '.join(wrong)}; "
            "compare on a Qwen3-MoE checkpoint with norm_topk_prob and plain rotary positions"
        )
    others = {tensor.dtype for tensor in checkpoint.tensors.values()} - set(_DTYPES)
    if others:
        raise CheckpointError(f"{checkpoint.path} holds {', '.join(sorted(others))} weights; give {', '.join(_DTYPES)}")


def _describe(writer: Any, config: Any) -> None:
    writer.add_name("poise-benchmark")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _values(tensor: Stacked) -> npt.NDArray[Any]:
    """The tensor in its GGUF dtype, bf16 as the 16-bit words that it is."""
    return np.concatenate(list(_converted(tensor.parts, tensor.dtype))).reshape(tensor.shape)


def _converted(parts: Sequence[TensorRef], dtype: str) -> Iterator[npt.NDArray[Any]]:
    for part in parts:
        words = np.fromfile(part.file, dtype=_DTYPES[part.dtype][1], count=int(np.prod(part.shape)), offset=part.offset)
        if part.dtype == dtype:
            yield words
        elif part.dtype == "BF16":
            yield (words.astype(np.uint32) << 16).view(np.float32)
        else:
            yield words.astype(np.float32)
