"""What all tests share: tiny checkpoints made on the spot, plain transformers beside them, and prompts drawn from a seed.

Every weight is noise, also those that transformers starts at zero or one (biases, norms, router corrections), so that no
part of a model can be left out unseen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from poise.engine.runner import Runner
from poise.model.checkpoint import open_checkpoint
from poise.model.dense import load_dense, take_out_experts
from poise.model.inspect import DTYPES, build_meta_model, choose_dtype, find_experts, load_config
from poise.model.layout import CheckpointLayout, find_layout
from poise.model.weights import converter_for, slot_bytes_for
from poise.offload.expert_store import ExpertStore
from poise.offload.loader import open_disk_store

MakeCheckpoint = Callable[..., Path]
OpenRunner = Callable[..., Runner]
Reference = Callable[..., Any]
DrawPrompts = Callable[..., list[list[int]]]

VOCABULARY = 128
CONTEXT = 256
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_EXPERTS_8 = {"num_experts": 8, "num_experts_per_tok": 2}
_EXPERTS_4 = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_NEXT = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DEEPSEEK_V3 = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
_JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
_GPT_OSS_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _EXPERTS_4),
    "mixtral_sliding": ("MixtralConfig", {**_EXPERTS_4, "sliding_window": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_EXPERTS_8, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", _EXPERTS_8),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK_V3),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_EXPERTS_4,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": _GPT_OSS_ROPE,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", _EXPERTS_4),
    "phimoe": ("PhimoeConfig", _EXPERTS_4),
    "qwen3_next": ("Qwen3NextConfig", {**_EXPERTS_8, **_QWEN3_NEXT}),
    "jamba": ("JambaConfig", _JAMBA),
    "llama": ("LlamaConfig", {}),
}
"""Configuration class and what differs from ``_SHAPE``, by the name that tests use."""


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A transformers configuration of a few thousand parameters."""
    name, own = CONFIGS[architecture]
    return getattr(transformers, name)(**{**_SHAPE, **own, **changes})


def write_checkpoint(path: Path, config: Any, dtype: torch.dtype, seed: int = 0) -> Path:
    """Random weights of a configuration, as transformers saves them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and "inv_freq" not in name and "A_log" not in name:
                tensor += 0.1 * torch.randn_like(tensor)
            elif tensor.is_floating_point() and not tensor.any():
                tensor.normal_(std=0.1)
        model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_reader_thread_is_left() -> Iterator[None]:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")}
    yield
    after = {thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")}
    assert after <= before, "the test left reader threads running"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``checkpoint("mixtral", "bfloat16")``: its directory, made once. Do not write into it."""
    made: dict[str, Path] = {}

    def make(architecture: str, dtype: str = "float32", **changes: Any) -> Path:
        key = f"{architecture}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(f"{architecture}-{dtype}")
            made[key] = write_checkpoint(path, tiny_config(architecture, **changes), DTYPES[dtype])
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Reference:
    """``reference(path)``: plain transformers' model of a checkpoint, all in memory."""
    loaded: dict[tuple[Path, torch.dtype | str], Any] = {}

    def load(path: Path, dtype: torch.dtype | str = "auto") -> Any:
        if (path, dtype) not in loaded:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            loaded[path, dtype] = model.eval()
        return loaded[path, dtype]

    return load


@pytest.fixture(scope="session")
def draw_prompts() -> DrawPrompts:
    """``draw_prompts((5, 17), seed=3)``: token ids of these lengths, no special tokens among them."""

    def draw(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

    return draw


@pytest.fixture
def open_runner() -> Iterator[OpenRunner]:
    """``open_runner(path, slots=1)``: a model whose experts are streamed; closed after the test."""
    stores: list[ExpertStore] = []

    def build(path: Path, *, slots: int = 1, dtype: str = "auto", threads: int = 2) -> Runner:
        model, layout, chosen = open_layout(path, dtype)
        modules = find_experts(model, model.config.model_type)
        take_out_experts(model, modules)
        load_dense(model, open_checkpoint(path), layout, chosen, torch.device("cpu"))
        stores.append(open_store(model, layout, slots=slots, threads=threads))
        return Runner(model, modules, stores[-1])

    yield build
    for store in stores:
        store.close()


def open_layout(path: Path, dtype: str = "auto") -> tuple[Any, CheckpointLayout, torch.dtype]:
    """The model on the meta device and where its tensors lie."""
    opened = open_checkpoint(path)
    config = load_config(opened)
    chosen = choose_dtype(opened, dtype)
    model = build_meta_model(config, chosen)
    return model, find_layout(opened, model, find_experts(model, config.model_type), chosen), chosen


def open_store(model: Any, layout: CheckpointLayout, *, slots: int, threads: int = 2) -> ExpertStore:
    """A store over a layout that can grow to hold every expert."""
    return open_disk_store(
        layout.experts_LE,
        num_slots=slots,
        slot_bytes=slot_bytes_for(layout.experts_LE),
        capacity=sum(len(row) for row in layout.experts_LE),
        reader_threads=threads,
        convert=converter_for(model),
    )
