"""The contenders of the GPU offload benchmark, each in a process of its own: loads, warms up, generates, prints one JSON line.

All get the same checkpoint, prompts of random tokens of one length, and the same number of new tokens, chosen greedily.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from poise import LLM, SamplingParams
from poise.engine.blueprint import Options, draw_up
from poise.plan.schedule import Policy
from poise.plan.workload import Workload
from poise.profile.accelerator import AcceleratorRates, accelerator_rates, copy_rate

PROMPT_TOKENS = 512
WARM_PROMPT_TOKENS, WARM_NEW_TOKENS = 64, 2
PLANNED_REQUESTS = 512
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def poise(options: argparse.Namespace) -> dict[str, Any]:
    """Poise: experts in DRAM, or behind it on the disk, and on the device what fits."""
    device = torch.device(options.device)
    tiers: dict[str, Any] = {"device": options.device, "device_memory": options.device_memory, "memory": options.memory}
    pairs = [(options.batch_size, n) for n in ((options.batches,) if options.batches else BATCHES)]
    began_s = time.perf_counter()
    drawn = draw_up(options.model, Options(groups=pairs, **tiers))
    count = min(options.batch_size * (options.batches or BATCHES[-1]), PLANNED_REQUESTS)
    plan = drawn.plan(Workload(prompt_tokens=(PROMPT_TOKENS,) * count, new_tokens=(options.new_tokens,) * count))
    batches = plan.num_batches
    rows = options.batch_size * batches
    rates = accelerator_rates(
        device, drawn.dtype.dtype, shape=max(_shapes(drawn), key=lambda shape: shape[0] * shape[1])
    )
    found = {}
    with LLM(options.model, groups=[(options.batch_size, batches)], **tiers) as llm:
        load_s = time.perf_counter() - began_s
        _say(f"loaded in {load_s:.1f} s; {rows} rows; {rates}")
        _generate(llm, rows, WARM_PROMPT_TOKENS, WARM_NEW_TOKENS)
        _say(f"warm after {time.perf_counter() - began_s - load_s:.1f} s more")
        for name in options.policies:
            llm.use_policy(_policy(name, drawn.spec.top_k))
            found[name] = _run(llm, rows, options.new_tokens, rates) | {"load_s": load_s}
    return found


def _policy(name: str, top_k: int) -> Policy:
    """Poise's own, and pipelines of the paper's ablation."""
    policies = {
        "planned": Policy(),
        "whole-layer": Policy(read_ahead="layer", order="index"),
        "hot": Policy(read_ahead="hot", order="arrival", ahead=top_k),
        "nothing-ahead": Policy(read_ahead="none", order="arrival"),
    }
    return policies[name]


def _run(llm: LLM, rows: int, new_tokens: int, rates: AcceleratorRates) -> dict[str, Any]:
    """One timed call; the bus is measured anew behind it."""
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    host, spec = llm._open()._supplier.host, llm.spec
    from_disk = host.bytes_read
    passes = _generate(llm, rows, PROMPT_TOKENS, new_tokens)
    facts, last, slots = llm.describe(), llm.last_progress, llm._open().num_slots
    assert last is not None
    rate = copy_rate(torch.device("cuda")) if is_gpu else rates.copy_bytes_per_s
    prefill_s = next(each["s"] for each in passes if each["generated_tokens"] >= rows)
    found = {
        "rows": rows,
        "elapsed_s": last.elapsed_s,
        "prefill_s": prefill_s,
        "decode_tokens_per_s": rows * (new_tokens - 1) / (last.elapsed_s - prefill_s),
        "generated_tokens": last.generated_tokens,
        "tokens_per_s": last.generated_tokens_per_s,
        "expert_slots": slots,
        "host_slots": host.num_slots,
        "experts": sum(spec.experts_L),
        "expert_bytes": spec.expert_bytes,
        "copied_bytes": last.bytes_read,
        "disk_bytes": host.bytes_read - from_disk,
        "prefill_ahead": last.prefill_ahead.as_json(),
        "decode_ahead": last.decode_ahead.as_json(),
        "rates": asdict(rates),
        "copy_bytes_per_s": rate,
        "limit": limits(passes, slots, spec, rate, rates.flops_per_s, rows * (PROMPT_TOKENS + new_tokens - 1)),
        "passes": {name: [each[name] for each in passes] for name in passes[0]},
        "plan": {key: value for key, value in facts.items() if isinstance(value, (int, float, str, bool))},
        "peak_device_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "reserved_device_bytes": torch.cuda.max_memory_reserved() if is_gpu else None,
    }
    _say(f"{found['tokens_per_s']:.1f} tokens/s, {found['decode_tokens_per_s']:.1f} in decode; {facts}")
    return found


def _shapes(drawn: Any) -> list[tuple[int, int]]:
    return [shape for shape in drawn.layout.experts_LE[0][0].shapes.values() if len(shape) == 2]


def _generate(llm: LLM, rows: int, prompt_tokens: int, new_tokens: int) -> list[dict[str, float]]:
    """Generates, and notes after every pass what had been done so far."""
    passes: list[dict[str, float]] = []

    def passed(progress: Any) -> None:
        passes.append(
            {
                "s": round(progress.elapsed_s, 4),
                "prompt_tokens": progress.prompt_tokens,
                "generated_tokens": progress.generated_tokens,
                "used": progress.expert_hits + progress.expert_misses,
                "copied_bytes": progress.bytes_read,
            }
        )

    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(rows, prompt_tokens, llm.spec.vocabulary)]
    llm.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True), on_progress=passed)
    return passes


def limits(
    passes: Sequence[dict[str, float]],
    slots: int,
    spec: Any,
    bytes_per_s: float,
    flops_per_s: float,
    tokens: int,
) -> dict[str, float]:
    """Least bytes over the bus, and least seconds: in every pass experts that are used and found no slot must come; every
    token's products must be computed: two operations for each weight, which takes two bytes. The larger of the two."""
    head_bytes = spec.hidden * spec.vocabulary * 2
    token_flops = spec.dense_bytes - 2 * head_bytes + len(spec.moe_layers) * spec.top_k * spec.expert_bytes
    flops = token_flops * tokens
    must, used = 0.0, 0.0
    for each in passes:
        must += max(0.0, each["used"] - used - slots) * spec.expert_bytes
        used = each["used"]
    return {
        "must_bytes": must,
        "copy_s": must / bytes_per_s,
        "compute_s": flops / flops_per_s,
        "seconds": max(must / bytes_per_s, flops / flops_per_s),
    }


def accelerate(options: argparse.Namespace) -> dict[str, Any]:
    """transformers and Accelerate: as many layers on the device as fit beside what a batch takes, the others in DRAM.

    Its first steps are timed; the other decode steps are taken to last as long as the median of those.
    """
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    times_s: list[float] = []
    is_gpu = options.device == "cuda"

    def note_time(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if is_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter())
        return scores

    began_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map=_places(options) if is_gpu else "cpu",
    ).eval()
    load_s = time.perf_counter() - began_s
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    _say(f"loaded in {load_s:.1f} s; on { ({place: places.count(place) for place in set(places)}) }")
    ids = torch.tensor(
        random_prompts(options.batch_size, PROMPT_TOKENS, model.config.vocab_size), device=options.device
    )
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    began_s = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.timed_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([note_time]),
        )
    prefill_s = times_s[0] - began_s
    steps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    elapsed_s = prefill_s + (options.new_tokens - 1) * statistics.median(steps_s)
    figures = {
        "rows": options.batch_size,
        "load_s": load_s,
        "prefill_s": prefill_s,
        "steps_s": steps_s,
        "elapsed_s": elapsed_s,
        "tokens_per_s": options.batch_size * options.new_tokens / elapsed_s,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "modules": {str(place): places.count(place) for place in set(places)},
    }
    return {"": figures}


def _places(options: argparse.Namespace) -> dict[str, int | str]:
    """What Accelerate's own map would be, were a layer not so large that it puts all of them into DRAM, compute included."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model)
    layer_bytes = 2 * 3 * config.hidden_size * config.intermediate_size * config.num_local_experts
    head_bytes = 2 * 2 * config.hidden_size * config.vocab_size
    stay = max(0, options.weights_bytes - head_bytes) // layer_bytes
    places: dict[str, int | str] = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    return places | {f"model.layers.{layer}": 0 if layer < stay else "cpu" for layer in range(config.num_hidden_layers)}


def random_prompts(rows: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """The same for everybody."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (rows, tokens), generator=generator).tolist()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
