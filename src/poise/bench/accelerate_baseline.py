"""The baseline: generation with plain transformers and Accelerate's disk offload, set up as a careful user would.

    python -m poise.bench.accelerate_baseline --model DIR --memory BYTES --prompts F.jsonl --max-tokens N \
        --batch-size B --offload-folder D [--max-time S] [--sample-seed N] [--ignore-eos]

Runs as a process of its own and prints one JSON line: ``load_s``, ``prefill_s``, ``decode_s``, ``generated_tokens``,
``results`` (text and token ids per prompt, up to and with the end-of-sequence token), ``peak_bytes`` (largest resident
set), ``read_bytes`` (what the kernel fetched from storage for it while generating; None where it is not counted),
``decode_read_bytes`` of them after the prompts.
``--memory`` bounds the weights that stay in memory. Accelerate first rewrites the others into the offload folder,
experts as fused tensors: give it room for them. A batch ends with the step that passes ``--max-time`` seconds; the
report then has fewer tokens. Uses nothing of Poise but the units.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from poise.units import parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one call of ``generate`` produced. ``prefill_s`` ends when the first token of every row is there."""

    prefill_s: float
    decode_s: float
    decode_read_bytes: int | None
    results: list[dict[str, Any]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, generate, print the JSON line."""
    options = _parser().parse_args(arguments)
    lines = [json.loads(line) for line in options.prompts.read_text().splitlines() if line.strip()]
    prompts = [line["prompt"] if "prompt" in line else line["prompt_token_ids"] for line in lines]
    start_s = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load(options.model, options.memory, options.offload_folder)
    load_s = time.perf_counter() - start_s
    read_before = _storage_bytes_read()
    batches = [
        generate(
            model,
            tokenizer,
            prompts[first : first + options.batch_size],
            max_new_tokens=options.max_tokens,
            max_time=options.max_time,
            sample_seed=options.sample_seed,
            **({"eos_token_id": None} if options.ignore_eos else {}),
        )
        for first in range(0, len(prompts), options.batch_size)
    ]
    results = [result for batch in batches for result in batch.results]
    read_after = _storage_bytes_read()
    report = {
        "load_s": load_s,
        "prefill_s": sum(batch.prefill_s for batch in batches),
        "decode_s": sum(batch.decode_s for batch in batches),
        "generated_tokens": sum(len(result["token_ids"]) for result in results),
        "results": results,
        "peak_bytes": _peak_bytes(),
        "read_bytes": _difference(read_before, read_after),
        "decode_read_bytes": _sum(batch.decode_read_bytes for batch in batches),
        "modules_in_memory": sum(place == "cpu" for place in model.hf_device_map.values()),
        "modules_on_disk": sum(place == "disk" for place in model.hf_device_map.values()),
    }
    print(json.dumps(report), flush=True)


def load(directory: Path, memory_bytes: int, offload_folder: Path) -> Any:
    """The model in bf16 with at most ``memory_bytes`` of weights in memory and the rest in ``offload_folder``."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": memory_bytes},
        offload_folder=offload_folder,
    )
    return model.eval()


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str | list[int]], *, sample_seed: int | None = None, **limits: Any
) -> Batch:
    """Continue ``prompts``, texts or token ids, as one left-padded batch; greedily, or sampled at temperature 1.

    ``limits`` are those of transformers' ``generate``.
    """
    ids = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in prompts]
    encoded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        limits |= {"temperature": 1.0, "top_k": 0}
    clock = _StepClock()
    tokens = model.generate(
        **encoded, **limits, do_sample=sample_seed is not None, pad_token_id=tokenizer.pad_token_id, streamer=clock
    )
    eos = _ids(limits.get("eos_token_id", model.generation_config.eos_token_id))
    rows = [_until_eos(row, eos) for row in tokens[:, encoded["input_ids"].shape[1] :].tolist()]
    return Batch(
        prefill_s=clock.times_s[1] - clock.times_s[0],
        decode_s=clock.times_s[-1] - clock.times_s[1],
        decode_read_bytes=_difference(clock.read_bytes[1], clock.read_bytes[-1]),
        results=[{"text": tokenizer.decode(row, skip_special_tokens=True), "token_ids": row} for row in rows],
    )


class _StepClock(BaseStreamer):  # type: ignore[misc]
    """Notes when ``generate`` starts, which hands over the prompts, and when each step has its tokens."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.read_bytes: list[int | None] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())
        self.read_bytes.append(_storage_bytes_read())

    def end(self) -> None:
        """The last step has been noted."""


def _ids(eos: list[int] | int | None) -> set[int]:
    return set(eos) if isinstance(eos, list) else set() if eos is None else {eos}


def _until_eos(row: list[int], eos: set[int]) -> list[int]:
    """The row as far as it was generated: rows that end early are padded to the longest."""
    end = next((position for position, token in enumerate(row) if token in eos), len(row))
    return row[: end + 1]


def _peak_bytes() -> int:
    """VmHWM starts anew at exec; ``ru_maxrss`` would include the parent's resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _storage_bytes_read() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ", 1) for line in lines)["read_bytes"])


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m poise.bench.accelerate_baseline", description="The baseline.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--memory", type=parse_bytes, required=True, metavar="BYTES", help="weights kept in memory")
    parser.add_argument("--prompts", type=Path, required=True, metavar="F.jsonl", help='{"prompt": "…"} a line')
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N")
    parser.add_argument("--batch-size", type=int, default=4, metavar="B")
    parser.add_argument("--offload-folder", type=Path, required=True, metavar="D")
    parser.add_argument("--max-time", type=float, metavar="S", help="end a batch with the step that passes this")
    parser.add_argument("--sample-seed", type=int, metavar="N", help="sample at temperature 1 instead of greedily")
    parser.add_argument("--ignore-eos", action="store_true", help="generate on after the end-of-sequence token")
    return parser


if __name__ == "__main__":
    main()
