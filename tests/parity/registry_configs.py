"""A tiny configuration of every mixture-of-experts class that transformers' registry of causal language models names.

Rules come first: sizes by the name of the field, one entry of every kind of layer where a list has one per layer. What the
rules get wrong for a model type is corrected in one dictionary, with the reason. Windows, blocks, compression rates and
indexer budgets are smaller than the prompts of the tests, so that each mechanism is at work.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
HIDDEN = 64
LAYERS = 4
HEADS = 4
EXPERTS = 8
TOP_K = 2

_MOE_CLASS = re.compile(r"^class \w*(Experts|MoE|Moe)\w*\(", re.MULTILINE)
_SIZES: tuple[tuple[Any, str], ...] = (
    # width, depth, vocabulary
    (HIDDEN, "hidden_size d_model"),
    (96, "intermediate_size ffn_hidden_size dense_intermediate_size"),
    (LAYERS, "num_hidden_layers num_layers n_layers"),
    (256, "max_position_embeddings model_max_length max_seq_len"),
    (0.1, "initializer_range"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (8, "hidden_size_per_layer_input"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    # attention
    (HEADS, "num_attention_heads n_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads"),
    (16, "head_dim global_head_dim swa_head_dim"),
    (8, "sliding_window sliding_window_size attention_chunk_size"),
    (16, "rel_extent"),
    (8, "rotary_dim d_rel"),
    # latent attention
    (32, "q_lora_rank"),
    (16, "kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank"),
    (8, "qk_rope_head_dim"),
    (2, "o_groups"),
    # sparse attention; few heads would leave most scores at exactly zero, and a tie is broken at will
    (32, "index_n_heads"),
    (16, "index_head_dim indexer_head_dim"),
    (6, "index_topk"),
    (3, "index_topk_blocks"),
    (HEADS, "indexer_n_heads index_block_size indexer_compress_ratio"),
    (1, "indexer_kv_heads"),
    (8, "indexer_budget"),
    ({"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "compress_rates"),
    # linear attention, state spaces, convolutions
    (4, "linear_num_value_heads linear_num_heads mamba_dt_rank"),
    (2, "linear_num_key_heads"),
    (16, "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim"),
    (8, "block_size mamba_chunk_size chunk_size mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size"),
    (1, "mamba_n_groups n_groups"),
    (3, "conv_L_cache"),
    (False, "use_mamba_kernels"),
    # experts
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (TOP_K, "num_experts_per_tok num_experts_per_token top_k_experts moe_k moe_topk"),
    (2, "n_group num_expert_group"),
    (1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size"),
    (32, "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (3, "moe_layer_end_index"),
    (4, "zero_expert_num"),
    (True, "enable_moe_block is_moe"),
)
SIZES: dict[str, Any] = {name: value for value, names in _SIZES for name in names.split()}
"""What a field becomes, where a configuration has it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What the rules get wrong for one model type (a composite one: of its text part), and why.

    ``around``: for composite configurations, what stands beside ``text_config``.
    """

    reason: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    around: dict[str, Any] = dataclasses.field(default_factory=dict)


_SLIDING = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_MAMBA = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SWA_HEADS = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 32, "kv_lora_rank": 16}
_SWA_WIDTHS = {"head_dim": 24, "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_rope_head_dim": 8}
_DOTS_VISION = _TOWER | {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": HIDDEN}
_DOTS_AUDIO = _TOWER | {"downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": HIDDEN}
_LLAMA_PROJECTOR = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
_LLAMA_VISION = _TOWER | _LLAMA_PROJECTOR | {"intermediate_size": 128, "image_size": 28}
_QWEN_SHAPE = {"depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN, "num_position_embeddings": 16}
_QWEN_VISION = {"vision_config": _QWEN_SHAPE | {"hidden_size": 32, "intermediate_size": 32}}
CORRECTIONS: dict[str, Correction] = {
    "dbrx": Correction(
        reason="sizes of attention and experts lie in configurations of their own",
        fields={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        },
    ),
    "dots3_note_text": Correction(
        reason="sliding layers have sizes of their own, layer by layer; towers beside the text",
        fields={"per_layer_config": dict.fromkeys((1, 2), _SWA_HEADS | _SWA_WIDTHS)},
        around={"vision_config": _DOTS_VISION, "audio_config": _DOTS_AUDIO},
    ),
    "gemma4_text": Correction(
        reason="attention scores are not scaled: with more or wider heads plain fp32 itself is 2e-5 away from fp64",
        fields={"head_dim": 8, "global_head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1},
        around={"vision_config": _TOWER | {"num_key_value_heads": 2, "head_dim": 16}},
    ),
    "granitemoehybrid": Correction(reason="no attention layer by default", fields={"layer_types": _MAMBA}),
    "jamba": Correction(
        reason="the first attention layer is the fifth by default",
        fields={"attn_layer_period": 4, "attn_layer_offset": 1},
    ),
    "laguna": Correction(reason="no sliding layer by default", fields={"layer_types": _SLIDING}),
    "lfm2_moe": Correction(
        reason="no layer types by default", fields={"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
    ),
    "llama4_text": Correction(reason="a tower beside the text", around={"vision_config": _LLAMA_VISION}),
    "mellum": Correction(reason="no sliding layer by default", fields={"layer_types": _SLIDING}),
    "minimax": Correction(reason="published checkpoints begin with linear attention", fields={"layer_types": _MAMBA}),
    "minimax_m3_vl_text": Correction(
        reason="no sparse attention by default, and it has a head of the indexer per key head",
        fields={
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "index_n_heads": 2,
        },
    ),
    "qwen3_5_moe_text": Correction(reason="a tower beside the text", around=_QWEN_VISION),
    "qwen4_exp_text": Correction(
        reason="no n-gram embeddings by default; a tower beside the text",
        fields={
            "ple_layer_ids": [1],
            "ple_embed_dim": 32,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 4,
            "split_ngram_parts": 2,
            "hc_lowrank": 8,
        },
        around=_QWEN_VISION,
    ),
    "zaya": Correction(
        reason="transformers allows one expert per token only; no sliding layer by default",
        fields={"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid"]},
    ),
}


def model_types() -> list[str]:
    """Every entry of the registry whose modelling file defines experts, in alphabetical order."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _MOE_CLASS.search(_source(name)))


def class_name(model_type: str) -> str:
    """The causal language model class of a model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return str(name if isinstance(name, str) else name[0])


def _source(model_type: str) -> str:
    return inspect.getsource(sys.modules[getattr(transformers, class_name(model_type)).__module__])


def tiny_config(model_type: str) -> Any:
    """A configuration of some ten thousand parameters, built by the rules and corrected."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    text = default.text_config if "text_config" in getattr(default, "sub_configs", {}) else default
    correction = CORRECTIONS.get(text.model_type, Correction(reason="none"))
    small = _shrunk(text) | correction.fields
    return kind(**small) if text is default else kind(text_config=small, **correction.around)


def _shrunk(default: Any) -> dict[str, Any]:
    """The arguments that make a default configuration tiny."""
    fields = default.to_dict()
    known = {field.name for field in dataclasses.fields(default)} if dataclasses.is_dataclass(default) else set(fields)
    known |= set(getattr(default, "attribute_map", {}))
    small = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in fields:
        # Latent attention has as many key heads as query heads, and rotates only its own part of a head.
        small |= {"num_key_value_heads": HEADS, "head_dim": SIZES["qk_rope_head_dim"]}
    depth = next((fields[name] for name in ("num_hidden_layers", "num_layers", "n_layers") if name in fields), None)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth and name in known:
            small[name] = one_of_each(value)
    return small


def one_of_each(kinds: Sequence[Any]) -> list[Any]:
    """``LAYERS`` entries: every kind in order of appearance, then again from the last."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct + distinct[::-1] * LAYERS)[:LAYERS]
