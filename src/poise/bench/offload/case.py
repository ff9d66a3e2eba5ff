"""The reference case: a model of 10 GB, 2.5 GB of memory with the page cache, a disk of 1 GB/s; and what a contender did.

The model has random weights in the shape of Qwen3-MoE, its embeddings scaled so that steps repeat each other as little as a
trained model's do; tokens are sampled. It is made once, below ``$POISE_BENCH_DIR`` or the directory for large temporary files,
and kept there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.bench.products import Products, Shape, measure_products
from poise.errors import UsageError
from poise.spec.whole_file import write_whole
from poise.units import GIB

MEMORY_BYTES = 2_500_000_000
READ_BYTES_PER_S = 1_000_000_000
BUDGET_BYTES = 2_000_000_000
"""Of Poise: the limit less what the process takes after its imports."""
CONFIG: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
ITEM_BYTES = 2
EMBEDDING_SCALE = 48.0
"""Of embeddings as initialised, in which the context, alike from step to step, would drown the token: 79 % of a step's experts
would be those of the step before, which flatters caches (decision 019). The bundled trained model repeats 40 to 43 %."""
_MARK = "complete-2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a contender did. ``total_s``: prefill and decode of ``new_tokens`` each; ``extrapolated_steps`` of the decode
    steps in it were not run but counted as the mean of those that were. ``step_s``: that mean, None where none was measured.
    ``step_bytes``: what the kernel (Poise: its reader) read in a step. ``peak_bytes``: of the memory group, page cache too.
    """

    name: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    total_s: float
    prefill_s: float | None
    step_s: float | None
    extrapolated_steps: int
    read_bytes: int | None
    step_bytes: float | None
    peak_bytes: int | None
    detail: Mapping[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over prefill and decode, as the paper counts."""
        return self.sequences * self.new_tokens / self.total_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceProducts:
    """The reference model's matrix products on this machine: ``bound.ProductTimes``."""

    products: Products

    def expert_s(self, tokens: Any) -> Any:
        """Gate and up together, then down."""
        hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
        return self.products.seconds([(2 * inner, hidden), (hidden, inner)], tokens)

    def layer_s(self, tokens: Any) -> Any:
        """Queries, keys and values together, then the output."""
        queries, both, hidden = _query_width(), 2 * _key_width(), CONFIG["hidden_size"]
        return self.products.seconds([(queries + both, hidden), (hidden, queries)], tokens)

    def head_s(self, tokens: Any) -> Any:
        """The logits."""
        return self.products.seconds([(CONFIG["vocab_size"], CONFIG["hidden_size"])], tokens)


def measure_reference_products() -> ReferenceProducts:
    """About half a minute."""
    import torch

    hidden, inner, queries = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], _query_width()
    shapes: list[Shape] = [(2 * inner, hidden), (hidden, inner), (queries + 2 * _key_width(), hidden)]
    shapes += [(hidden, queries), (CONFIG["vocab_size"], hidden)]
    return ReferenceProducts(products=measure_products(shapes, dtype=torch.bfloat16))


def _query_width() -> int:
    return int(CONFIG["num_attention_heads"] * CONFIG["head_dim"])


def _key_width() -> int:
    return int(CONFIG["num_key_value_heads"] * CONFIG["head_dim"])


def cache_bytes_per_token() -> int:
    """Keys and values of one token in all layers."""
    return 2 * _key_width() * ITEM_BYTES * int(CONFIG["num_hidden_layers"])


def work_directory() -> Path:
    """Where the model lies: 30 GB are needed, for it, for its GGUF file and for what Accelerate writes."""
    directory = Path(os.environ.get("POISE_BENCH_DIR", "/var/tmp/poise-bench"))
    directory.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < 30 * GIB and not (directory / "model" / _MARK).exists():
        raise UsageError(
            f"{directory} has too little room; 30 GiB are needed: set POISE_BENCH_DIR to another directory"
        )
    return directory


def reference_model(directory: Path) -> Path:
    """The checkpoint; made in about two minutes where it is not there yet."""
    target = directory / "model"
    if (target / _MARK).exists():
        return target
    import shutil

    from transformers import AutoConfig

    import poise
    from poise.model.random_checkpoint import make_checkpoint

    shutil.rmtree(target, ignore_errors=True)
    make_checkpoint(AutoConfig.for_model("qwen3_moe", **CONFIG), target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(poise.__file__).parent / "assets" / "tiny-moe" / name, target / name)
    _scale_embeddings(target)
    write_whole(target / _MARK, "")
    return target


def _scale_embeddings(model: Path) -> None:
    """In place; bf16."""
    import numpy as np

    from poise.model.checkpoint import open_checkpoint

    tensor = open_checkpoint(model).tensors["model.embed_tokens.weight"]
    words = np.memmap(tensor.file, dtype=np.uint16, mode="r+", offset=tensor.offset, shape=tensor.shape)
    values = (words.astype(np.uint32) << 16).view(np.float32) * np.float32(EMBEDDING_SCALE)
    words[:] = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    words.flush()


def write_prompts(file: Path, model: Path, *, count: int, tokens: int) -> None:
    """``count`` pieces of Python's standard library, each of exactly ``tokens`` tokens."""
    import sysconfig

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    ids: list[int] = []
    for source in sources:
        ids += tokenizer(source.read_text(errors="ignore"), verbose=False)["input_ids"]
        if len(ids) >= count * tokens:
            break
    pieces = [ids[place * tokens : (place + 1) * tokens] for place in range(count)]
    assert len(pieces[-1]) == tokens, "the standard library has too few tokens"
    write_whole(file, "".join(json.dumps({"prompt_token_ids": piece}) + "\n" for piece in pieces))
