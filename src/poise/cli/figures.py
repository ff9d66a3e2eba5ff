"""What `poise generate` says of a run in numbers: the model before, its speed meanwhile, its plan and what it took after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from poise.cli.progress import say
from poise.cli.tier_names import tier_names
from poise.engine.request import Progress
from poise.units import format_bytes, format_s

if TYPE_CHECKING:
    from poise.engine.llm import LLM
    from poise.engine.parallel_llm import ParallelLLM


_OF_STREAMS = ("bytes_read", "expert_hits", "expert_misses", "prefill_ahead", "decode_ahead")
"""Fields of Progress that say something only where experts come from disk."""


def say_header(model: Mapping[str, object]) -> None:
    """The model in numbers, before a run."""
    chosen = [name for name in model if f"{name}_reason" in model]
    for name in chosen:
        say(f"{name}: {model[name]} ({model[f'{name}_reason']})")
    facts = []
    for name, value in model.items():
        if name.removesuffix("_reason") in chosen:
            continue
        if name.endswith("_bytes") and isinstance(value, int | float):
            facts.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {format_bytes(value)}")
        else:
            facts.append(f"{name.replace('_', ' ')} {value}")
    say(", ".join(facts))


def taken(llm: LLM | ParallelLLM, progress: Progress | None = None) -> dict[str, Any]:
    """What the run took, for the summary and --json; ``progress``: how far it came, None: to its end."""
    from poise.engine.llm import LLM

    progress = progress or llm.last_progress
    assert progress is not None, "the engine has generated"
    memory: dict[str, int | None] = {
        "base_bytes": llm.base_bytes,
        "budget_bytes": llm.budget_bytes,
        "peak_bytes": llm.peak_bytes,
    }
    if isinstance(llm, LLM) and llm.device_peak_bytes is not None:
        memory |= {"device_peak_bytes": llm.device_peak_bytes, "device_budget_bytes": llm.device_budget_bytes}
    ranks = {} if isinstance(llm, LLM) else {"parallel": _of_ranks(llm)}
    return {**measured(progress, streams=isinstance(llm, LLM)), **memory, **ranks}


def _of_ranks(llm: ParallelLLM) -> dict[str, Any]:
    """How even ranks were, and every change of the placement, with its moves."""
    figures, balancing, steps = llm.figures, llm.balancing, llm.step_figures
    assert figures is not None, "rank 0 has generated"
    return {
        **figures.to_json(),
        "rebalances": [] if balancing is None else [asdict(each) for each in balancing.history],
        "balanced": None if steps is None else steps.to_json(),
    }


def learnt_lines(llm: LLM, stats: Mapping[str, Any]) -> list[str]:
    """What a lookahead has learnt online; nothing where none does."""
    if llm.online is None:
        return []
    share = llm.online.spent_s / stats["elapsed_s"]
    return [f"learnt online: {llm.online.steps} steps of learning, {share:.1%} of the time"]


def measured(progress: Progress, *, streams: bool) -> dict[str, Any]:
    """Where a run stands, with its rates and, where experts are streamed, what was read and how good the read-ahead was."""
    facts = {**asdict(progress), "generated_tokens_per_s": progress.generated_tokens_per_s}
    if not streams:
        return {name: value for name, value in facts.items() if name not in _OF_STREAMS}
    ahead = {"prefill_ahead": progress.prefill_ahead.as_json(), "decode_ahead": progress.decode_ahead.as_json()}
    return {**facts, **ahead, "hit_frac": progress.hit_frac}


def rates(stats: Mapping[str, Any]) -> str:
    """Speed and, where experts are streamed, bytes read and hits, for a line of progress."""
    speed = f"{stats['generated_tokens_per_s']:.3g} tokens/s"
    if "hit_frac" not in stats:
        return speed
    return f"{speed}, {format_bytes(stats['bytes_read'])} read, {stats['hit_frac']:.0%} expert hits"


def plan_line(plan: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """How the run was planned, and what came of it. ``plan``: what ``LLM.describe`` says after a run."""
    names = tier_names(plan)
    streamed = f", {plan['dense_layers_streamed']} dense layers streamed" if plan["dense_layers_streamed"] else ""
    return (
        f"plan: {plan['num_batches']} x {plan['batch_size']} rows (n x bs), {plan['prefetch_experts']} experts read ahead "
        f"(K), {plan['expert_slots']} of {plan['experts']} experts {names.there}, keys and values "
        f"{names.away if plan['kv_on_disk'] else names.there}{streamed}; bottleneck: {names.bottleneck(plan['bottleneck'])}; "
        f"{_rate(stats['generated_tokens_per_s'])} tokens/s measured, {_rate(plan['predicted_tokens_per_s'])} predicted "
        f"({plan['bound_frac']:.0%} of what perfect overlap would give; costs {plan['costs']})"
    )


def _rate(tokens_per_s: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{float(f'{tokens_per_s:.3g}'):,g}"


def summary(stats: Mapping[str, Any]) -> Iterator[str]:
    """The closing lines of a run."""
    added_bytes = max(0, stats["peak_bytes"] - stats["base_bytes"])
    yield (
        f"{stats['generated_tokens']} tokens in {format_s(stats['elapsed_s'])}, {rates(stats)}, "
        f"peak memory {format_bytes(added_bytes)} of a budget of {format_bytes(stats['budget_bytes'])}"
        f"{' on rank 0' * ('parallel' in stats)}"
    )
    if "device_peak_bytes" in stats:
        peak_bytes, budget_bytes = stats["device_peak_bytes"], stats["device_budget_bytes"]
        yield f"peak device memory {format_bytes(peak_bytes)} of a budget of {format_bytes(budget_bytes)}"
    for phase in ("prefill", "decode"):
        ahead = stats.get(f"{phase}_ahead")
        if ahead is not None and ahead["named"]:
            yield _guesses(phase, ahead)


def _guesses(phase: str, ahead: Mapping[str, Any]) -> str:
    """How good the choice of what was read ahead was, in the paper's terms."""
    return (
        f"read ahead in {phase}: {ahead['named']:,} experts, {ahead['used_frac']:.0%} used, "
        f"{ahead['hottest_frac']:.0%} among the hottest of those to read"
    )
