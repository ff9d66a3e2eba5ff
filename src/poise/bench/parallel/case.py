"""What the expert-parallel benchmarks run: two models, text for them, and the ranks that run it.

The widened bundled model has real routing, of which code and prose are two domains; the other one has random weights and
popular experts, and sends more. Both are computed in fp32, made once, and kept below ``$POISE_BENCH_DIR``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.bench.cluster.layout import ClusterLayout, RankLimits
from poise.errors import UsageError
from poise.spec.whole_file import write_whole
from poise.units import GIB

DTYPE = "float32"
MEMORY = 3 * GIB
"""Of each rank; not a limit that matters here."""
ROW_TOKENS = 256
FACTOR = 32
"""The bundled model's experts get this many times as wide: 1,280."""
RANDOM_CONFIG: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
SKEW = 0.7
WIDE_CONFIG: Mapping[str, Any] = {**RANDOM_CONFIG, "hidden_size": 1024, "moe_intermediate_size": 256}
"""Tokens are twice as wide and experts a quarter, so that sending is a large part of a step."""
WIDE_DAMPING = 0.025
"""At which a router that is asked a layer early is right about as often as in trained models (decision 066)."""
ROOM_BYTES = 2 * GIB

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, and rows of ``ROW_TOKENS`` tokens for it by what they are about: at least two kinds of rows."""

    name: str
    model: Path
    rows: Mapping[str, Ints]


def equal_ranks(cores: float = 0.34) -> ClusterLayout:
    """Four ranks with like shares, in all as much as the unequal ones have."""
    return ClusterLayout(name="4 equal ranks", ranks=(RankLimits(cores=cores),) * 4)


def one_rank() -> ClusterLayout:
    """One rank with a core."""
    return ClusterLayout(name="1 rank", ranks=(RankLimits(core=0),))


def shared_ranks(count: int) -> ClusterLayout:
    """Ranks without limits, for what is not timed."""
    return ClusterLayout(name=f"{count} ranks, no limits", ranks=(RankLimits(),) * count)


def work_directory() -> Path:
    """Where the models lie; 2 GiB are needed."""
    directory = Path(os.environ.get("POISE_BENCH_DIR", "/var/tmp/poise-bench")) / "parallel"
    directory.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < ROOM_BYTES and not (directory / f"random-{SKEW:g}").exists():
        raise UsageError(f"{directory} has too little room; 2 GiB are needed: set POISE_BENCH_DIR to another directory")
    return directory


def widened_case(directory: Path) -> Case:
    """The bundled model, and windows of code and of prose, of files that it was trained on and of others."""
    from poise.bench.routed_text import MODEL
    from poise.model.widen import widen_checkpoint

    target = directory / f"widened-{FACTOR}"
    if not target.exists():
        widen_checkpoint(MODEL, target, FACTOR)
    return Case(name=f"bundled model, experts {FACTOR} times as wide", model=target, rows=_text(directory))


def bundled_case(directory: Path) -> Case:
    """The bundled model as it is, with the same text."""
    from poise.bench.routed_text import MODEL

    return Case(name="bundled model", model=MODEL, rows=_text(directory))


def random_case(directory: Path, *, skew: float = SKEW) -> Case:
    """Random weights and tokens; the r-th most popular expert is chosen by about 1 / r ^ ``skew``."""
    return _of_random_weights(directory / f"random-{skew:g}", RANDOM_CONFIG, "random weights", skew)


def wide_case(directory: Path) -> Case:
    """The same with wide tokens, narrow experts, and hidden states that change little from layer to layer."""
    target, name = directory / f"random-wide-{SKEW:g}-{WIDE_DAMPING:g}", "random weights, wide tokens"
    return _of_random_weights(target, WIDE_CONFIG, name, SKEW, damping=WIDE_DAMPING)


def _of_random_weights(
    target: Path, config: Mapping[str, Any], name: str, skew: float, *, damping: float = 1.0
) -> Case:
    from transformers import AutoConfig

    from poise.model.random_checkpoint import make_checkpoint

    if not target.exists():
        made = AutoConfig.for_model("qwen3_moe", **config)
        make_checkpoint(made, target, dtype=DTYPE, skew=skew, damping=damping)
    draw = np.random.default_rng(0)
    rows = {kind: draw.integers(3, config["vocab_size"], (400, ROW_TOKENS)) for kind in ("profile", "measured")}
    return Case(name=f"{name}, popularity 1 / rank ^ {skew:g}", model=target, rows=rows)


@cache
def _text(directory: Path) -> Mapping[str, Ints]:
    """``code`` and ``prose`` held out, ``code profile`` and ``prose profile`` of training files; kept in a file."""
    file = directory / "text.json"
    if not file.exists():
        from transformers import AutoTokenizer

        from poise.bench.corpus import load_corpus
        from poise.bench.routed_text import MODEL, windows_of

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        found = {}
        for domain in load_corpus():
            found[domain.name] = windows_of(tokenizer, domain, "held_out", 400).tolist()
            found[f"{domain.name} profile"] = windows_of(tokenizer, domain, "train", 200).tolist()
        write_whole(file, json.dumps(found))
    return {name: np.array(rows) for name, rows in json.loads(file.read_text()).items()}


def cycled(rows_WT: Ints, count: int) -> Ints:
    """``count`` rows, from the begin again where there are fewer."""
    return rows_WT[np.arange(count) % len(rows_WT)]


def beginnings(rows_WT: Ints, count: int, tokens: int) -> Ints:
    """``count`` stretches of so many tokens, from all over the rows."""
    whole = rows_WT[:, : rows_WT.shape[1] // tokens * tokens].reshape(-1, tokens)
    begun_WT: Ints = whole[np.linspace(0, len(whole) - 1, count).astype(int)]
    return begun_WT


def write_rows(file: Path, rows: Sequence[Sequence[int]] | Sequence[Ints] | Ints) -> str:
    """Prompts of a job; the name of their file."""
    write_whole(file, json.dumps([[int(token) for token in row] for row in rows]))
    return str(file)


def prefill_job(
    case: Case, prompts: str, *, rows_per_rank: int, balance: str = "static", **more: Any
) -> dict[str, Any]:
    """A job of passes over ``rows_per_rank`` new prompts on every rank, each of which ends with its first token."""
    return {
        "model": str(case.model),
        "memory": MEMORY,
        "dtype": DTYPE,
        "balance": balance,
        "groups": [[rows_per_rank, 1]],
        "prompts": prompts,
        "new_tokens": 1,
        **more,
    }
