"""The contenders of the offload benchmarks on the reference case, each in a process of its own under the same limits."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from poise.bench.limits import ChildResult, Limits, forget_cached
from poise.bench.offload.bound import PassWork, Sizes, pass_limits
from poise.bench.offload.case import (
    BUDGET_BYTES,
    CONFIG,
    ITEM_BYTES,
    MEMORY_BYTES,
    READ_BYTES_PER_S,
    Outcome,
    ReferenceProducts,
    cache_bytes_per_token,
    reference_model,
    write_prompts,
)
from poise.bench.offload.gguf import GET_PEERS, write_gguf
from poise.bench.read_ahead import read_ahead_kib as current_read_ahead_kib
from poise.bench.read_ahead import set_read_ahead
from poise.errors import PoiseError, UsageError
from poise.spec.trace import RoutingTrace

TIMEOUT_S = 3600.0
OUT_OF_MEMORY = "killed by the kernel: it needs more memory than the limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contenders:
    """``products``: for Poise's limit; None where nobody asks for it."""

    limits: Limits
    directory: Path
    products: ReferenceProducts | None = None

    def poise(
        self, *, sequences: int, prompt_tokens: int, new_tokens: int, steps: int | None = None, **options: Any
    ) -> Outcome:
        """``steps``: decode steps of all sequences that are run, None: all. ``options``: see ``bench.offload.worker``."""
        model, prompts = self._given(sequences, prompt_tokens)
        job = {
            "model": str(model),
            "prompts": str(prompts),
            "new_tokens": new_tokens,
            "memory": BUDGET_BYTES,
            **options,
        }
        if steps is not None and steps < new_tokens - 1:
            job["decode_steps"] = steps
        routing = self.directory / "routing.safetensors"
        if self.products is not None:
            job["routing"] = str(routing)
        child = self._run(
            [sys.executable, "-m", "poise.bench.offload.worker", json.dumps(job)],
            XDG_CACHE_HOME=str(self.directory / "cache"),
        )
        assert not isinstance(child, str), "nothing was to be set"
        answer = answer_of(child, "Poise")
        decode = decode_passes(answer["passes"])
        is_whole = answer["generated_tokens"] == sequences * new_tokens
        missing = 0 if steps is None or is_whole else new_tokens - 1 - steps
        step_s = fmean(each["seconds"] for each in decode) if decode else None
        if self.products is not None:
            trace = RoutingTrace.load(routing)
            add_limits(answer["passes"], trace, answer["plan"], self.products, prompt_tokens + new_tokens - 1)
        return Outcome(
            name="Poise",
            sequences=sequences,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            total_s=answer["elapsed_s"] + (missing * step_s if step_s is not None else 0.0),
            prefill_s=answer["prefill_s"],
            step_s=step_s,
            extrapolated_steps=missing,
            read_bytes=answer["bytes_read"],
            step_bytes=fmean(each["bytes"] for each in decode) if decode else None,
            peak_bytes=child.peak_bytes,
            detail=answer,
        )

    def accelerate(
        self,
        *,
        sequences: int,
        prompt_tokens: int,
        new_tokens: int,
        steps: int,
        weights_bytes: int,
        read_ahead_kib: int | None,
        max_s: float,
    ) -> Outcome | str:
        """One batch. At most ``steps`` decode steps are run, fewer where generating takes longer than ``max_s``; the others
        are counted as their mean. ``weights_bytes`` may stay in memory; ``read_ahead_kib``: see ``bench.read_ahead``. A string
        says why there is no outcome.
        """
        model, prompts = self._given(sequences, prompt_tokens)
        offload = self.directory / "accelerate"
        shutil.rmtree(offload, ignore_errors=True)
        run_tokens = min(new_tokens, steps + 1)
        try:
            child = self._run(
                [
                    *(sys.executable, "-m", "poise.bench.accelerate_baseline", "--model", str(model)),
                    *("--prompts", str(prompts), "--max-tokens", str(run_tokens), "--memory", str(weights_bytes)),
                    *("--batch-size", str(sequences), "--offload-folder", str(offload), "--max-time", str(max_s)),
                    *("--ignore-eos", "--sample-seed", "0"),
                ],
                read_ahead_kib=read_ahead_kib,
            )
        finally:
            shutil.rmtree(offload, ignore_errors=True)
        if isinstance(child, str):
            return child
        if child.out_of_memory:
            return OUT_OF_MEMORY
        if child.timed_out:
            return f"stopped after {TIMEOUT_S:.0f} s"
        report = answer_of(child, "Accelerate")
        outcome = _accelerate_outcome(report, sequences, prompt_tokens, new_tokens, child.peak_bytes)
        if outcome is None:
            return f"no decode step within {max_s:.0f} s; its prefill took {report['prefill_s']:.0f} s"
        given = {"weights_bytes": weights_bytes, "read_ahead_kib": self._read_ahead(read_ahead_kib)}
        return replace(outcome, detail={**given, **outcome.detail})

    def llama(
        self,
        *,
        sequences: int,
        prompt_tokens: int,
        new_tokens: int,
        steps: int,
        read_ahead_kib: int | None,
        max_s: float,
    ) -> Outcome | str:
        """llama.cpp with ``sequences`` parallel sequences of one context; steps as with ``accelerate``."""
        _, prompts = self._given(sequences, prompt_tokens)
        gguf = llama_model(self.directory)
        forget_cached(gguf)
        child = self._run(
            [
                *(sys.executable, "-m", "poise.bench.llama_baseline", "--model", str(gguf)),
                *("--prompts", str(prompts), "--max-tokens", str(min(new_tokens, steps + 1)), "--max-time", str(max_s)),
            ],
            read_ahead_kib=read_ahead_kib,
        )
        if isinstance(child, str):
            return child
        if child.out_of_memory:
            return OUT_OF_MEMORY
        if child.timed_out:
            return f"stopped after {TIMEOUT_S:.0f} s"
        report = answer_of(child, "llama.cpp")
        steps_s: list[float] = report["steps_s"]
        if not steps_s:
            return f"no decode step within {max_s:.0f} s; its prefill took {report['prefill_s']:.0f} s"
        reads: list[int | None] = report["steps_read_bytes"]
        known = [count for count in reads if count is not None]
        missing = new_tokens - 1 - len(steps_s)
        return Outcome(
            name="llama.cpp",
            sequences=sequences,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            total_s=report["prefill_s"] + sum(steps_s) + missing * fmean(steps_s),
            prefill_s=report["prefill_s"],
            step_s=fmean(steps_s),
            extrapolated_steps=missing,
            read_bytes=child.read_bytes,
            step_bytes=fmean(known) if known else None,
            peak_bytes=child.peak_bytes,
            detail={key: value for key, value in report.items() if key != "token_ids"}
            | {"read_ahead_kib": self._read_ahead(read_ahead_kib)},
        )

    def _given(self, sequences: int, prompt_tokens: int) -> tuple[Path, Path]:
        """The checkpoint, out of the page cache, and the prompts."""
        model = reference_model(self.directory)
        prompts = self.directory / f"prompts-{sequences}-{prompt_tokens}.jsonl"
        write_prompts(prompts, model, count=sequences, tokens=prompt_tokens)
        forget_cached(model)
        return model, prompts

    def _run(self, argv: Sequence[str], *, read_ahead_kib: int | None = None, **environment: str) -> ChildResult | str:
        """A string says why the read-ahead could not be set."""
        with set_read_ahead(self.directory, read_ahead_kib) as refusal:
            if refusal is not None:
                return refusal
            return self.limits.run(argv, env={**_environment(), **environment}, timeout_s=TIMEOUT_S)

    def _read_ahead(self, kib: int | None) -> int | None:
        return kib if kib is not None else current_read_ahead_kib(self.directory)


def _accelerate_outcome(
    report: dict[str, Any], sequences: int, prompt_tokens: int, new_tokens: int, peak_bytes: int | None
) -> Outcome | None:
    """None: not one decode step was run."""
    measured = report["generated_tokens"] // sequences - 1
    if measured < 1:
        return None
    step_s = report["decode_s"] / measured
    read_bytes = report["decode_read_bytes"]
    return Outcome(
        name="Accelerate",
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        total_s=report["prefill_s"] + step_s * (new_tokens - 1),
        prefill_s=report["prefill_s"],
        step_s=step_s,
        extrapolated_steps=new_tokens - 1 - measured,
        read_bytes=report["read_bytes"],
        step_bytes=None if read_bytes is None else read_bytes / measured,
        peak_bytes=peak_bytes,
        detail={
            "load_s": report["load_s"],
            "modules_on_disk": report["modules_on_disk"],
            "peak_rss_bytes": report["peak_bytes"],
        },
    )


def llama_model(directory: Path) -> Path:
    """The reference checkpoint as GGUF; made in a minute where it is not there. Raises UsageError without llama.cpp."""
    import importlib.util

    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        raise UsageError(GET_PEERS)
    model, target = reference_model(directory), directory / "model.gguf"
    if not target.exists() or target.stat().st_mtime < model.stat().st_mtime:
        write_gguf(model, target)
    return target


def decode_passes(passes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The passes in which all rows that run at once get a token: all but the first of those, which may be a prompt's."""
    most = max((each["tokens"] for each in passes), default=0)
    return [each for each in passes if each["tokens"] == most][1:]


def add_limits(
    passes: list[dict[str, Any]],
    trace: RoutingTrace,
    plan: dict[str, Any],
    products: ReferenceProducts,
    row_tokens: int,
) -> None:
    """Gives every pass its limit. ``row_tokens``: what a finished row's cache held."""
    sizes = Sizes(
        room_bytes=MEMORY_BYTES - plan["base_bytes"],
        expert_bytes=plan["expert_bytes"],
        dense_bytes=plan["dense_bytes"],
        cache_bytes_per_token=cache_bytes_per_token(),
        activation_bytes_per_token=2 * CONFIG["hidden_size"] * ITEM_BYTES,
    )
    assert len(passes) == len(trace.tokens_per_step), "every pass was recorded"
    works: list[PassWork] = []
    computed = finished = 0
    for each, counts_LE, tokens in zip(passes, trace.counts_NLE, trace.tokens_per_step, strict=True):
        cached = computed - finished * row_tokens
        works.append(PassWork(counts_LE=counts_LE, tokens=tokens, logits=each["tokens"], cached_tokens=cached))
        computed, finished = computed + tokens, each["finished"]
    limits = pass_limits(works, sizes, products, read_bytes_per_s=READ_BYTES_PER_S)
    for each, limit in zip(passes, limits, strict=True):
        each["limit"] = asdict(limit) | {"seconds": limit.seconds}


def _environment() -> dict[str, str]:
    """The same for all contenders."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {"GOMP_SPINCOUNT": "10000"} | os.environ | quiet


def answer_of(child: ChildResult, name: str) -> Any:
    """The JSON line that a contender printed last. Raises PoiseError, with what it said, where there is none."""
    if child.returncode != 0 or not child.stdout.strip():
        reason = "killed by the kernel: out of memory" if child.out_of_memory else child.stderr.strip()[-600:]
        raise PoiseError(f"{name} failed: {reason or f'exit status {child.returncode}'}")
    return json.loads(child.stdout.strip().splitlines()[-1])
