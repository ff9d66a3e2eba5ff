"""The reference case: a model of 10 GB, 2.5 GB of memory with the page cache, a disk of 1 GB/s; and the contenders' runs.

The model has random weights and routing as initialised, in the shape of Qwen3-MoE; tokens are sampled, so that steps do not
repeat themselves. It is made once, below ``$POISE_BENCH_DIR`` or the directory for large temporary files, and kept there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.bench.limits import ChildResult, Limits, forget_cached
from poise.errors import PoiseError, UsageError
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
TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a contender did. ``prefill_s`` and ``steps_s`` (one per further token) are what it spent; None: it was stopped."""

    name: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    total_s: float
    prefill_s: float | None
    measured_tokens: int
    read_bytes: int | None
    peak_bytes: int | None
    detail: Mapping[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over prefill and decode, as the paper counts."""
        return self.sequences * self.new_tokens / self.total_s


def work_directory() -> Path:
    """Where the model lies: 20 GB are needed, for it and for what Accelerate writes."""
    directory = Path(os.environ.get("POISE_BENCH_DIR", "/var/tmp/poise-bench"))
    directory.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < 20 * GIB and not (directory / "model" / "config.json").exists():
        raise UsageError(
            f"{directory} has too little room; 20 GiB are needed: set POISE_BENCH_DIR to another directory"
        )
    return directory


def reference_model(directory: Path) -> Path:
    """The checkpoint; made in about two minutes where it is not there yet."""
    target = directory / "model"
    if (target / "complete").exists():
        return target
    import shutil

    from transformers import AutoConfig

    import poise
    from poise.model.random_checkpoint import make_checkpoint

    shutil.rmtree(target, ignore_errors=True)
    make_checkpoint(AutoConfig.for_model("qwen3_moe", **CONFIG), target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(poise.__file__).parent / "assets" / "tiny-moe" / name, target / name)
    write_whole(target / "complete", "")
    return target


def write_prompts(file: Path, model: Path, *, count: int, tokens: int) -> None:
    """``count`` pieces of Python's standard library, each of exactly ``tokens`` tokens."""
    import sysconfig

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    ids: list[int] = []
    for source in sources:
        ids += tokenizer(source.read_text(errors="ignore"))["input_ids"]
        if len(ids) >= count * tokens:
            break
    pieces = [ids[place * tokens : (place + 1) * tokens] for place in range(count)]
    assert len(pieces[-1]) == tokens, "the standard library has too few tokens"
    write_whole(file, "".join(json.dumps({"prompt_token_ids": piece}) + "\n" for piece in pieces))


def run_poise(
    limits: Limits, directory: Path, *, sequences: int, prompt_tokens: int, new_tokens: int, **options: Any
) -> Outcome:
    """``options``: see ``bench.offload.worker``."""
    model = reference_model(directory)
    prompts = directory / f"prompts-{sequences}-{prompt_tokens}.jsonl"
    write_prompts(prompts, model, count=sequences, tokens=prompt_tokens)
    job = {"model": str(model), "prompts": str(prompts), "new_tokens": new_tokens, "memory": BUDGET_BYTES, **options}
    forget_cached(model)
    child = limits.run(
        [sys.executable, "-m", "poise.bench.offload.worker", json.dumps(job)],
        env={**_environment(), "XDG_CACHE_HOME": str(directory / "cache")},
        timeout_s=TIMEOUT_S,
    )
    answer = _answer(child, "Poise")
    return Outcome(
        name="Poise",
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=answer["new_tokens"],
        total_s=answer["elapsed_s"],
        prefill_s=answer["prefill_s"],
        measured_tokens=answer["generated_tokens"],
        read_bytes=answer["bytes_read"],
        peak_bytes=child.peak_bytes,
        detail=answer,
    )


def run_accelerate(
    limits: Limits,
    directory: Path,
    *,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    weights_bytes: int,
    max_s: float,
) -> Outcome | str:
    """One batch of ``sequences``. Stopped after ``max_s`` of generating; the rest of its steps are counted as its mean one.

    ``weights_bytes`` may stay in memory. A string says why there is no outcome.
    """
    import shutil

    model = reference_model(directory)
    prompts = directory / f"prompts-{sequences}-{prompt_tokens}.jsonl"
    write_prompts(prompts, model, count=sequences, tokens=prompt_tokens)
    offload = directory / "accelerate"
    forget_cached(model)
    try:
        child = limits.run(
            [
                *(sys.executable, "-m", "poise.bench.accelerate_baseline", "--model", str(model)),
                *("--prompts", str(prompts), "--max-tokens", str(new_tokens), "--memory", str(weights_bytes)),
                *("--batch-size", str(sequences), "--offload-folder", str(offload), "--max-time", str(max_s)),
                *("--ignore-eos", "--sample-seed", "0"),
            ],
            env=_environment(),
            timeout_s=TIMEOUT_S,
        )
    finally:
        shutil.rmtree(offload, ignore_errors=True)
    if child.out_of_memory:
        return "killed by the kernel: it needs more memory than the limit"
    if child.timed_out:
        return f"stopped after {TIMEOUT_S:.0f} s"
    report = _answer(child, "Accelerate")
    steps = report["generated_tokens"] // sequences - 1
    step_s = report["decode_s"] / steps if steps else float("nan")
    return Outcome(
        name="Accelerate",
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        total_s=report["prefill_s"] + step_s * (new_tokens - 1),
        prefill_s=report["prefill_s"],
        measured_tokens=report["generated_tokens"],
        read_bytes=report["read_bytes"],
        peak_bytes=child.peak_bytes,
        detail={
            "step_s": step_s,
            "measured_steps": steps,
            "load_s": report["load_s"],
            "weights_bytes": weights_bytes,
            "modules_on_disk": report["modules_on_disk"],
        },
    )


def _environment() -> dict[str, str]:
    """The same for all contenders."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {"GOMP_SPINCOUNT": "10000"} | os.environ | quiet


def _answer(child: ChildResult, name: str) -> Any:
    if child.returncode != 0 or not child.stdout.strip():
        reason = "killed by the kernel: out of memory" if child.out_of_memory else child.stderr.strip()[-600:]
        raise PoiseError(f"{name} failed: {reason or f'exit status {child.returncode}'}")
    return json.loads(child.stdout.strip().splitlines()[-1])
