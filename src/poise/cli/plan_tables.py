"""A pipeline plan for people, as tables, and for programs, as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from poise.cli.tier_names import TierNames, tier_names
from poise.units import format_bytes, format_s

if TYPE_CHECKING:
    from rich.table import Table

    from poise.engine.blueprint import Blueprint
    from poise.plan.pipeline import PipelinePlan
    from poise.plan.workload import Workload

JSON_VERSION = 1


def plan_as_json(drawn: Blueprint, workload: Workload, plan: PipelinePlan) -> dict[str, Any]:
    """What --json prints: model, requests, and the plan with everything that the tables show."""
    spec, decode, tier = drawn.spec, plan.decode, drawn.tier
    device = None if tier is None else {"device": str(tier.device), "experts_in_dram": tier.host_slots}
    return {
        "version": JSON_VERSION,
        "model": asdict(spec),
        "dtype_reason": drawn.dtype.reason,
        "quantize": drawn.options.quantize,
        "costs": drawn.costs.source,
        "routing": drawn.routing.source,
        "disk_bytes_per_s": drawn.costs.layers.disk_bytes_per_s,
        "requests": {
            "count": workload.num_requests,
            "prompt_tokens": sum(workload.prompt_tokens),
            "new_tokens": sum(workload.new_tokens),
        },
        "device": device,
        "budget_bytes": plan.budget_bytes,
        "memory_bytes": plan.memory_bytes,
        "group": asdict(plan.group),
        "prefetch_experts": plan.prefetch_experts,
        "expert_slots": plan.num_slots,
        "cache_on_disk": plan.cache_on_disk,
        "dense_layers_streamed": len(plan.dense.streamed),
        "tiers": [asdict(each) for each in plan.tiers],
        "predicted_s": plan.predicted_s,
        "predicted_tokens_per_s": plan.predicted_tokens_per_s,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "bound_frac": plan.bound_frac,
        "bottleneck": plan.bottleneck,
        "decode": {
            "seconds": decode.seconds,
            "disk_s": decode.disk_s,
            "compute_s": decode.compute_s,
            "exposed_s": decode.exposed_s,
            "experts_used": decode.active,
            "experts_read": decode.missing,
        },
        "inequalities": [{**asdict(each), "holds": each.holds} for each in decode.inequalities],
        "alternatives": [asdict(each) for each in plan.alternatives],
    }


def print_plan(drawn: Blueprint, workload: Workload, plan: PipelinePlan) -> None:
    """Prints the tables on standard output."""
    from rich.console import Console

    from poise.engine.facts import model_facts

    console, names = Console(), tier_names(model_facts(drawn))
    summary = _summary(drawn, workload, plan, names)
    for table in (summary, _tiers(plan, names), _inequalities(plan), _ranking(plan, names)):
        console.print(table)


def _summary(drawn: Blueprint, workload: Workload, plan: PipelinePlan, names: TierNames) -> Table:
    spec, group, decode, tier = drawn.spec, plan.group, plan.decode, drawn.tier
    count = workload.num_requests
    prompt, new = sum(workload.prompt_tokens) / count, sum(workload.new_tokens) / count
    experts = "experts in 4 bits" if drawn.options.quantize == "int4" else spec.dtype
    where = "" if tier is None else f" of {tier.device} and {format_bytes(drawn.budget_bytes)} of DRAM"
    table = _table(
        f"{spec.architecture}, {format_bytes(spec.total_bytes)} ({experts}), in {format_bytes(plan.budget_bytes)}{where}"
    )
    in_dram = "" if tier is None else f", where {tier.host_slots:,} of {sum(spec.experts_L):,} experts fit"
    for name, value in (
        ("requests", f"{count:,} of {prompt:.0f} tokens, continued by up to {new:.0f}"),
        ("batch group", f"{group.num_batches} batches of {group.batch_size}"),
        ("prompt tokens", f"up to {group.chunk_tokens} of each prompt and {group.pass_tokens:,} in all in a pass"),
        ("read ahead (K)", f"{plan.prefetch_experts} experts of {format_bytes(spec.expert_bytes)}"),
        ("predicted", f"{plan.predicted_tokens_per_s:.3g} tokens/s, {format_s(plan.predicted_s)} in all"),
        (
            "with perfect overlap",
            f"{plan.bound_tokens_per_s:.3g} tokens/s by the costs and routing below; {plan.bound_frac:.0%} of it is predicted",
        ),
        ("bottleneck", names.bottleneck(plan.bottleneck)),
        (
            "a decode pass",
            f"{format_s(decode.seconds)}: {names.way} {format_s(decode.disk_s)}, compute {format_s(decode.compute_s)}, "
            f"behind nothing {format_s(decode.exposed_s)}",
        ),
        ("", f"uses {decode.active:.0f} experts and reads {decode.missing:.0f}"),
        (names.below, f"{drawn.costs.layers.disk_bytes_per_s / 1e9:.2f} GB/s{in_dram}"),
        ("costs", drawn.costs.source),
        ("routing", drawn.routing.source),
    ):
        table.add_row(name, value)
    table.show_header = False
    return table


def _tiers(plan: PipelinePlan, names: TierNames) -> Table:
    table = _table("What lies where", "tier", "what", "count", "bytes")
    for place in plan.tiers:
        count = "" if place.count is None else f"{place.count:,}"
        table.add_row(
            names.memory if place.tier == "memory" else names.below, place.what, count, format_bytes(place.nbytes)
        )
    return table


def _inequalities(plan: PipelinePlan) -> Table:
    table = _table("No bubbles if, in a layer of a decode pass,", "condition", "compute", "input/output", "holds")
    for each in plan.decode.inequalities:
        table.add_row(each.name, format_s(each.compute_s), format_s(each.io_s), "yes" if each.holds else "no")
    return table


def _ranking(plan: PipelinePlan, names: TierNames) -> Table:
    columns = ("n x bs", "K", "expert slots", "caches", "dense layers streamed", "tokens/s")
    table = _table("Best plan of each batch group", *columns)
    rows = (
        (
            plan.group,
            plan.prefetch_experts,
            plan.num_slots,
            plan.cache_on_disk,
            len(plan.dense.streamed),
            plan.predicted_tokens_per_s,
        ),
        *(
            (
                each.group,
                each.prefetch_experts,
                each.num_slots,
                each.cache_on_disk,
                each.streamed_layers,
                each.predicted_tokens_per_s,
            )
            for each in plan.alternatives
        ),
    )
    for group, ahead, slots, on_disk, streamed, speed in rows:
        table.add_row(
            f"{group.num_batches} x {group.batch_size}",
            str(ahead),
            str(slots),
            names.below if on_disk else names.memory,
            str(streamed),
            f"{speed:.3g}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns or ("", "")):
        is_number = column in ("count", "bytes", "compute", "input/output", "K", "expert slots", "tokens/s") and place
        table.add_column(column, justify="right" if is_number else "left")
    return table
