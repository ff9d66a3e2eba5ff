"""The contenders of the GPU offload benchmark, each in a process of its own: loads, warms up, generates, yields its figures.

All get the same checkpoint, prompts of random tokens of one length, and the same number of new tokens, chosen greedily.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from poise import LLM, SamplingParams
from poise.plan.candidates import DEVICE_NUM_BATCHES
from poise.plan.group import GroupShape
from poise.plan.pipeline import PipelinePlan
from poise.plan.schedule import Policy
from poise.plan.workload import Workload
from poise.profile.accelerator import AcceleratorRates, accelerator_rates, copy_rate
from poise.spec.timeline import Timeline

FEW_NEW_TOKENS = 3
"""Of a run that only warms up, or shows where time goes."""
PLANNED_REQUESTS = 2_000
"""So many wait, for all that the plan knows; as many run as it has run at once."""


def poise(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Poise: experts in DRAM, or behind it on the disk, and on the device what fits. A model that is loaded once runs all.

    ``options.runs``: a batch size, or ``any``, and a policy each, as in ``64:planned``; with ``:kept`` caches stay on the
    device. ``explain``, ``capped``: short runs. Those that turn out to be alike are made once; one that fails is told.
    """
    began_s = time.perf_counter()
    done: dict[tuple[GroupShape, bool, str], str] = {}
    tiers: dict[str, Any] = {"device": options.device, "device_memory": options.device_memory, "memory": options.memory}
    with LLM(options.model, **tiers) as llm:
        rates = _rates(llm)
        load_s = time.perf_counter() - began_s
        _say(f"loaded in {load_s:.1f} s; {rates}")
        for run in options.runs:
            try:
                found = _one_run(llm, run, options, rates, done)
            except Exception as error:  # noqa: BLE001 - told, and the next may do
                _say(traceback.format_exc())
                found = {"error": repr(error)[:400]}
            if found is not None:
                yield run, found | {"load_s": load_s}


def _one_run(
    llm: LLM,
    run: str,
    options: argparse.Namespace,
    rates: AcceleratorRates,
    done: dict[tuple[GroupShape, bool, str], str],
) -> dict[str, Any] | None:
    """None for one that was made before, by another name."""
    if run == "explain":
        return _explained(llm, options)
    if run == "capped":
        return _capped(llm, options)
    size, policy, *kept = run.split(":")
    plan = _use_group(llm, size, options, may_move=not kept)
    key = (plan.group, plan.cache_on_disk, policy)
    if key in done:
        _say(f"{run}: as {done[key]}")
        return None
    llm.use_policy(_policy(policy, llm.spec.top_k))
    rows = plan.group.max_rows
    if not any(key[:2] == warm[:2] for warm in done):
        began_s = time.perf_counter()
        _generate(llm, rows, _long_prompt_tokens(options), FEW_NEW_TOKENS)
        _say(f"{run}: warm after {time.perf_counter() - began_s:.1f} s")
    done[key] = run
    return _run(llm, rows, options, rates)


def _long_prompt_tokens(options: argparse.Namespace) -> int:
    """So that a short run is as long in all as a timed one: memory for caches is then of the same sizes, and pinned before."""
    return int(options.prompt_tokens + options.new_tokens - FEW_NEW_TOKENS)


def _use_group(llm: LLM, size: str, options: argparse.Namespace, *, may_move: bool = True) -> PipelinePlan:
    """Has the LLM run the group that is planned with batches of this size, or of any, for more requests than fit."""
    counts = (options.batches,) if options.batches else DEVICE_NUM_BATCHES
    drawn = llm._blueprint
    pairs = None if size == "any" else [(int(size), n) for n in counts]
    count = int(size) * options.batches if options.batches and size != "any" else PLANNED_REQUESTS
    kv_on_disk = None if may_move else False
    drawn = replace(drawn, options=replace(drawn.options, groups=pairs, kv_on_disk=kv_on_disk))
    assert drawn.tier is not None, "experts are copied to a device"
    moves = drawn.tier.may_move_cache(drawn.options, drawn.pipeline.cache)
    drawn = replace(drawn, pipeline=replace(drawn.pipeline, may_move_cache=moves))
    plan = drawn.plan(
        Workload(prompt_tokens=(options.prompt_tokens,) * count, new_tokens=(options.new_tokens,) * count)
    )
    fixed = [(plan.batch_size, plan.num_batches)]
    llm._blueprint = replace(drawn, options=replace(drawn.options, groups=fixed))
    return plan


def _rates(llm: LLM) -> AcceleratorRates:
    shapes = [shape for shape in llm._blueprint.layout.experts_LE[0][0].shapes.values() if len(shape) == 2]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    return accelerator_rates(llm._blueprint.device, llm._blueprint.dtype.dtype, shape=largest)


def _explained(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by kind of span in a short run. Noting them makes the host wait for every expert: they sum to more than a run."""
    timeline = Timeline()
    rows = _use_group(llm, "any", options).group.max_rows
    llm.use_policy(_policy("planned", llm.spec.top_k))
    passes = _generate(llm, rows, _long_prompt_tokens(options), FEW_NEW_TOKENS, timeline=timeline)
    prompts_end = next(index for index, each in enumerate(passes) if each["generated_tokens"] >= rows)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    starts = sorted(span.begin_ns for span in timeline.spans if span.name == "pass")
    decode_ns = starts[prompts_end + 1] if prompts_end + 1 < len(starts) else 0
    for span in timeline.spans:
        phase = "decode" if span.begin_ns >= decode_ns else "prefill"
        each = sums[f"{phase}, {span.track}: {span.name}"]
        each[0] += (span.end_ns - span.begin_ns) / 1e9
        each[1] += 1
    return {"passes": len(passes), "prefill_passes": prompts_end + 1, "spans": dict(sorted(sums.items()))}


def _capped(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    """A short run in which torch may take no more of the GPU than the budget, what it keeps for later included."""
    if not torch.cuda.is_available():
        return {"done": False, "reason": "no GPU"}
    rows = _use_group(llm, "any", options).group.max_rows
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    budget = llm._blueprint.tier.budget_bytes if llm._blueprint.tier is not None else 0
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info()[1])
    try:
        passes = _generate(llm, rows, _long_prompt_tokens(options), FEW_NEW_TOKENS)
    except torch.cuda.OutOfMemoryError as error:
        return {"done": False, "reason": str(error)[:400]}
    return {
        "done": True,
        "seconds": [each["s"] for each in passes],
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
        "reserved_device_bytes": torch.cuda.max_memory_reserved(),
    }


def _policy(name: str, top_k: int) -> Policy:
    """Poise's own, and pipelines of the paper's ablation."""
    policies = {
        "planned": Policy(),
        "whole-layer": Policy(read_ahead="layer", order="index"),
        "hot": Policy(read_ahead="hot", order="arrival", ahead=top_k),
        "nothing-ahead": Policy(read_ahead="none", order="arrival"),
    }
    return policies[name]


def _run(llm: LLM, rows: int, options: argparse.Namespace, rates: AcceleratorRates) -> dict[str, Any]:
    """One timed call; the bus is measured anew behind it."""
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    host, spec = llm._open()._supplier.host, llm.spec
    from_disk, moved = host.bytes_read, _moved_bytes(llm)
    prompt_tokens, new_tokens = options.prompt_tokens, options.new_tokens
    passes = _generate(llm, rows, prompt_tokens, new_tokens)
    facts, last, slots = llm.describe(), llm.last_progress, llm._open().num_slots
    assert last is not None
    caches_read, caches_written = (after - before for before, after in zip(moved, _moved_bytes(llm), strict=True))
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
        "caches_read_bytes": caches_read,
        "caches_written_bytes": caches_written,
        "disk_bytes": host.bytes_read - from_disk,
        "prefill_ahead": last.prefill_ahead.as_json(),
        "decode_ahead": last.decode_ahead.as_json(),
        "rates": asdict(rates),
        "copy_bytes_per_s": rate,
        "limit": limits(passes, slots, spec, rate, rates.flops_per_s, rows * (prompt_tokens + new_tokens - 1))
        | {"with_caches_s": (last.bytes_read + caches_read) / rate},
        "passes": {name: [each[name] for each in passes] for name in passes[0]},
        "plan": {key: value for key, value in facts.items() if isinstance(value, (int, float, str, bool))},
        "peak_device_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "reserved_device_bytes": torch.cuda.max_memory_reserved() if is_gpu else None,
    }
    _say(f"{found['tokens_per_s']:.1f} tokens/s, {found['decode_tokens_per_s']:.1f} in decode; {facts}")
    return found


def _moved_bytes(llm: LLM) -> tuple[int, int]:
    """Of caches, to the device and back, since caches first moved."""
    counters = None if llm._kv is None else llm._kv.counters
    return (0, 0) if counters is None else (counters.bytes_read, counters.bytes_written)


def _generate(
    llm: LLM, rows: int, prompt_tokens: int, new_tokens: int, *, timeline: Timeline | None = None
) -> list[dict[str, float]]:
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
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    llm.generate(prompts, params, on_progress=passed, timeline=timeline)
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


def accelerate(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
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
        random_prompts(options.batch_size, options.prompt_tokens, model.config.vocab_size), device=options.device
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
    yield f"bs {options.batch_size}", figures


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
