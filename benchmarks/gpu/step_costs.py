"""What balancing a step costs the computing thread on a GPU: the lookahead, counts to the host, plan, assignment to the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch

from benchmarks.gpu.hiding import MODEL
from benchmarks.gpu.layers import EXPERTS, RANKS, TOKENS, TOP_K, GroupedExperts, load_of, rows_for, subject_of
from benchmarks.gpu.timing import device_s, host_s
from poise.model.lookahead import Lookahead, counted_E
from poise.model.lookahead_training import WIDTH
from poise.parallel.forecast import Ahead
from poise.parallel.routes import Copies, route, route_by
from poise.parallel.step_news import RankNews
from poise.parallel.step_options import StepOptions
from poise.parallel.step_planner import Links, StepPlanner
from poise.profile.experts import expert_run, load_experts
from poise.profile.subject import Subject
from poise.units import GIB

DEVICE = torch.device("cuda", 0)


def lookahead_costs() -> list[dict[str, object]]:
    """A row for each phase: seconds of the lookahead on the GPU and for the caller, beside those of a rank's experts."""
    subject = subject_of(MODEL)
    for module in subject.model.modules():
        _to_gpu(module)
    frozen, taught = (Lookahead.of_model(subject.model, subject.modules, width=width) for width in (None, WIDTH))
    return [_row(subject, frozen, taught, phase) for phase in TOKENS]


def _row(subject: Subject, frozen: Lookahead, taught: Lookahead, phase: str) -> dict[str, object]:
    tokens, hidden = TOKENS[phase], subject.hidden
    hidden_TH = torch.randn(tokens, hidden, device=DEVICE).to(torch.bfloat16)
    real_T = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    ahead = Ahead(taught, 2, EXPERTS)
    forecasts = {
        "frozen": lambda: frozen.choices_TK(1, hidden_TH),
        "taught": lambda: taught.choices_TK(1, hidden_TH),
        "taught, to counts on the host": lambda: ahead.counts_E(1, hidden_TH, real_T),
    }
    _, load = load_of(phase)
    grouped = GroupedExperts(MODEL, len(load.balanced_E))
    rows_PH, ends_E = rows_for(load.balanced_E, hidden)
    active = EXPERTS // RANKS
    resident = load_experts(subject, scratch_bytes=2 * GIB, device=str(DEVICE))
    run = expert_run(subject, resident, tokens=tokens * TOP_K // active * active, active=active, device=str(DEVICE))
    on_gpu, for_caller = device_s(forecasts), host_s(forecasts, rounds=50)
    expert_s = device_s({"grouped": lambda: grouped(rows_PH, ends_E)})["grouped"]
    per_token = 2 * (2 * hidden * EXPERTS + hidden * WIDTH + WIDTH * EXPERTS) - 2 * hidden * EXPERTS
    return {
        "phase": phase,
        "tokens": tokens,
        "lookahead_device_s": on_gpu,
        "lookahead_caller_s": for_caller,
        "experts_grouped_s": expert_s,
        "experts_engine_s": host_s({"engine": run}, rounds=10)["engine"],
        "flops_frac": per_token / (TOP_K * subject.expert_flops_per_token),
    }


def round_trip() -> list[dict[str, object]]:
    """Microseconds of each part of what a rank does between its router and its tokens' departure, median of many."""
    return [{"phase": phase, **{name: 1e6 * each for name, each in _parts(phase)}} for phase in TOKENS]


def _parts(phase: str) -> Iterator[tuple[str, float]]:
    case, _ = load_of(phase)
    counts_RE = case.steps[0].astype(np.int64)
    links = Links(
        bytes_per_s_R=np.full(RANKS, case.link_bytes_per_s),
        token_bytes=int(case.model.token_bytes),
        expert_bytes=int(case.model.expert_bytes),
    )
    planner = StepPlanner(
        np.arange(EXPERTS)[None],
        links,
        num_experts=EXPERTS,
        replica_slots=3,
        most_work=StepOptions().most_work,
        costs=case.costs,
    )
    planner.rehearse()
    one_R = np.ones(RANKS)
    plan = planner.plan(0, counts_RE, 1e-3 * one_R, one_R, one_R)
    assert plan is not None, "costs are known"
    dispatch = planner.dispatch(0, counts_RE, plan.replica_N3, one_R, one_R, rank=0)
    assert dispatch is not None, "costs are known"
    choice_TK = _choices(counts_RE[0])
    host_TK = choice_TK.cpu()
    copies = Copies.of(np.arange(EXPERTS), num_experts=EXPERTS, num_ranks=RANKS)
    news_RN = torch.zeros(RANKS, len(fields(RankNews)) + 2 * EXPERTS + RANKS, dtype=torch.int64, device=DEVICE)
    parts = {
        "choices_to_host_and_counts_us": lambda: counted_E(choice_TK.cpu(), EXPERTS),
        "news_to_host_us": lambda: news_RN.cpu(),
        "plan_us": lambda: planner.plan(0, counts_RE, 1e-3 * one_R, one_R, one_R),
        "divide_us": lambda: planner.dispatch(0, counts_RE, plan.replica_N3, one_R, one_R, rank=0),
        "routes_by_plan_us": lambda: route_by(host_TK, dispatch[0], num_ranks=RANKS, device=DEVICE),
        "routes_at_home_us": lambda: route(host_TK, copies, source_rank=0, device=DEVICE),
    }
    yield from host_s(parts).items()


def _choices(counts_E: np.ndarray) -> torch.Tensor:
    """So many choices of each expert, in random order, eight a token."""
    flat = torch.from_numpy(np.repeat(np.arange(EXPERTS), counts_E))
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return flat[order][: len(flat) // TOP_K * TOP_K].view(-1, TOP_K).to(DEVICE)


def _to_gpu(module: torch.nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.to(DEVICE)
