"""Experts spread over ranks compute what one process computes, wherever they lie and while they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise.model.inspect import find_experts
from poise.model.seam import Parked
from poise.model.weights import converter_for
from poise.parallel.exchange import Coming, Received, TokenExchange
from poise.parallel.group import RankGroup
from poise.parallel.launch import Launch
from poise.parallel.migration import Migration
from poise.parallel.moe_layer import ExpertParallelLayers, LayerRecord
from poise.parallel.rank_experts import RankExperts, experts_of, shard_bytes
from poise.parallel.routes import Copies, route
from poise.parallel.watch import Patience
from poise.spec.placement import Placement, contiguous
from tests.conftest import MakeCheckpoint, Reference, open_layout
from tests.ranks import start_ranks

HIDDEN, TOP_K, LAYERS = 64, 2, (0, 1)
NO_BATCH = (torch.empty(0, HIDDEN), torch.empty(0, TOP_K, dtype=torch.int64), torch.empty(0, TOP_K), None)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Hidden states, choices, weights, and which tokens are real (None: all)."""


def placed(rows_LS: Sequence[Sequence[int]], num_experts: int, ranks: int) -> Placement:
    return Placement(
        slot_to_expert_LS=np.array(rows_LS, dtype=np.int32), layers=LAYERS, num_experts=num_experts, ranks=ranks
    )


def batches_of(rank: int, layer: int, num_experts: int, dtype: torch.dtype) -> list[Batch]:
    """Rank 0 has two batches, one of them padded; rank 1 has none; the others have one, of 1, 40, 1, ... tokens."""
    generator = torch.Generator().manual_seed(100 * layer + rank)
    sizes = [7, 12] if rank == 0 else [] if rank == 1 else [1 if rank % 2 == 0 else 40]
    batches: list[Batch] = []
    for number, size in enumerate(sizes):
        hidden_TH = torch.randn(size, HIDDEN, generator=generator).to(dtype)
        choice_TK = torch.stack([torch.randperm(num_experts, generator=generator)[:TOP_K] for _ in range(size)])
        weights_TK = torch.rand(size, TOP_K, generator=generator).to(dtype)
        real_T = torch.arange(size) % 3 > 0 if rank == 0 and number == 1 else None
        batches.append((hidden_TH, choice_TK, weights_TK, real_T))
    return batches


@dataclass
class Job:
    """A rank with its shard of a checkpoint in memory."""

    group: RankGroup
    experts: RankExperts
    layers: ExpertParallelLayers
    modules: list[Any]
    num_experts: int
    dtype: torch.dtype

    def run(self, layer: int) -> list[torch.Tensor]:
        batches = batches_of(self.group.rank, layer, self.num_experts, self.dtype)
        parked = [Parked(self.modules[layer], *batch[:3]) for batch in batches]
        return self.layers.run(parked, [batch[3] for batch in batches], layer=layer)


def load(launch: Launch, path: Path, placement: Placement) -> Job:
    group = RankGroup(launch, {}, patience=Patience(start_s=60, behind_s=30))
    model, layout, dtype = open_layout(path)
    modules = [model.get_submodule(module.name) for module in find_experts(model, model.config.model_type)]
    capacity = (len(LAYERS) + 1) * placement.slots_per_rank
    experts = RankExperts(layout.unpacked().experts_LE, capacity=capacity, convert=converter_for(model))
    experts.load((layer, e) for layer, row in enumerate(experts_of(placement, launch.rank)) for e in sorted(row))
    copies = [
        Copies.of(row_S, num_experts=placement.num_experts, num_ranks=placement.ranks)
        for row_S in placement.slot_to_expert_LS
    ]
    exchange = TokenExchange(group, hidden=HIDDEN, top_k=TOP_K, dtype=dtype)
    layers = ExpertParallelLayers(modules, experts, exchange, copies, rank=launch.rank)
    return Job(group, experts, layers, modules, placement.num_experts, dtype)


@torch.inference_mode()
def run_every_layer(
    launch: Launch, path: Path, placement: Placement, is_grouped: bool = False
) -> tuple[list[list[torch.Tensor]], list[LayerRecord], int]:
    job = load(launch, path, placement)
    job.layers.is_grouped = is_grouped
    job.layers.records = records = []
    with job.group:
        outputs = [job.run(layer) for layer in range(len(LAYERS))]
        job.experts.close()
        return outputs, records, job.experts.num_free


def expected(model: Any, layer: int, batch: Batch) -> torch.Tensor:
    """What transformers' own experts make of a batch; padding gets nothing."""
    hidden_TH, choice_TK, weights_TK, real_T = batch
    with torch.inference_mode():
        experts = find_experts(model, model.config.model_type)[layer]
        output_TH: torch.Tensor = model.get_submodule(experts.name)(hidden_TH, choice_TK, weights_TK)
        return output_TH if real_T is None else output_TH * real_T[:, None]


def largest_error(
    model: Any, outputs: Sequence[list[list[torch.Tensor]]], num_experts: int, dtype: torch.dtype
) -> float:
    """Over all ranks, layers and batches, relative to the largest output."""
    errors, largest = [0.0], 0.0
    for rank, by_layer in enumerate(outputs):
        for layer, batches in enumerate(by_layer):
            given = batches_of(rank, layer, num_experts, dtype)
            for output_TH, batch in zip(batches, given, strict=True):
                wanted_TH = expected(model, layer, batch)
                errors.append(float((output_TH - wanted_TH).abs().max()))
                largest = max(largest, float(wanted_TH.abs().max()))
    return max(errors) / largest


E8 = {
    "contiguous on 4": contiguous(LAYERS, num_experts=8, ranks=4, slots_per_rank=2),
    "contiguous on 2": contiguous(LAYERS, num_experts=8, ranks=2, slots_per_rank=4),
    "one rank": contiguous(LAYERS, num_experts=8, ranks=1, slots_per_rank=8),
    "shuffled on 4": placed([[3, 6, 0, 1, 7, 2, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]], 8, 4),
    "replicas on 4": placed([[3, 6, 0, 1, 0, 7, 2, 0, 5, 4, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 7, 6]], 8, 4),
}


@pytest.mark.parametrize("name", E8)
def test_outputs_are_those_of_one_process(
    name: str, checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path
) -> None:
    placement, path = E8[name], checkpoint("qwen3_moe")
    results = start_ranks(run_every_layer, placement.ranks, tmp_path, path, placement).results()
    assert largest_error(reference(path), [outputs for outputs, _, _ in results], 8, torch.float32) < 1e-5
    tokens = sum(
        int(real_T.sum()) if real_T is not None else len(hidden_TH)
        for rank in range(placement.ranks)
        for layer in range(2)
        for hidden_TH, _, _, real_T in batches_of(rank, layer, 8, torch.float32)
    )
    assert sum(record.routed_tokens for _, records, _ in results for record in records) == tokens * TOP_K


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [("gpt_oss", "float32", 1e-5), ("granitemoe", "float32", 1e-5), ("mixtral", "bfloat16", 2e-2)],
)
def test_biases_transposed_fused_and_half_precision_experts_too(
    architecture: str, dtype: str, tolerance: float, checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path
) -> None:
    path = checkpoint(architecture, dtype)
    placement = contiguous(LAYERS, num_experts=4, ranks=2, slots_per_rank=2)
    results = start_ranks(run_every_layer, 2, tmp_path, path, placement).results()
    outputs = [each for each, _, _ in results]
    assert largest_error(reference(path), outputs, 4, getattr(torch, dtype)) < tolerance


def test_experts_computed_all_at_once(checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path) -> None:
    """As on GPUs, in slots of which some are empty."""
    path, placement = checkpoint("qwen3_moe", "bfloat16"), E8["replicas on 4"]
    results = start_ranks(run_every_layer, 4, tmp_path, path, placement, True).results()
    assert largest_error(reference(path), [outputs for outputs, _, _ in results], 8, torch.bfloat16) < 2e-2
    one_by_one = start_ranks(run_every_layer, 4, tmp_path / "one", path, placement).results()
    for (_, records, _), (_, others, _) in zip(results, one_by_one, strict=True):
        counts = [[(each.routed_tokens, each.active_experts) for each in row] for row in (records, others)]
        assert counts[0] == counts[1]


def test_a_token_with_two_experts_on_a_rank_travels_once(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    placement = contiguous(LAYERS, num_experts=8, ranks=2, slots_per_rank=4)
    results = start_ranks(run_every_layer, 2, tmp_path, checkpoint("qwen3_moe"), placement).results()
    row_bytes = 8 * TOP_K + 4 * HIDDEN
    for layer in range(2):
        away = 0
        for _, choice_TK, _, real_T in batches_of(0, layer, 8, torch.float32):
            away += int(((choice_TK >= 4).any(dim=1) & (True if real_T is None else real_T)).sum())
        assert results[0][1][layer].sent_bytes == away * row_bytes


@torch.inference_mode()
def receive(launch: Launch, more: int) -> tuple[Received, Received]:
    """The same rows, counted before they come, and with a bound on how many may come that is too high by ``more``."""
    placement = contiguous(LAYERS, num_experts=8, ranks=4, slots_per_rank=2)
    copies = Copies.of(placement.slot_to_expert_LS[0], num_experts=8, num_ranks=4)
    hidden_TH, choice_TK, weights_TK, _ = (batches_of(launch.rank, 0, 8, torch.float32) or [NO_BATCH])[0]
    with RankGroup(launch, {}, patience=Patience(start_s=60, behind_s=30)) as group:
        exchange = TokenExchange(group, hidden=HIDDEN, top_k=TOP_K, dtype=torch.float32)
        routes = route(choice_TK, copies, source_rank=group.rank)
        counted = exchange.dispatch(hidden_TH, weights_TK, routes, layer=0)
        most_R = [rows + (0 if rank == group.rank else more) for rank, rows in enumerate(counted.received_R)]
        coming = Coming(rows_R=tuple(most_R), is_exact=False)
        bounded = exchange.dispatch(hidden_TH, weights_TK, routes, layer=0, coming=coming)
        back_TH = exchange.combine(bounded.hidden_MH, bounded, tokens=len(hidden_TH), layer=0)
        ranks_T = torch.bincount(routes.token_N, minlength=len(hidden_TH))
        assert torch.allclose(back_TH, hidden_TH * ranks_T[:, None])
        return counted, bounded


@pytest.mark.parametrize("more", [0, 1, 50])
def test_rows_need_not_be_counted_where_a_bound_is_known(more: int, tmp_path: Path) -> None:
    """What it rests on: Gloo takes a message that is shorter than the room for it."""
    for counted, bounded in start_ranks(receive, 4, tmp_path, more).results():
        assert bounded.received_R == counted.received_R
        assert torch.equal(bounded.hidden_MH, counted.hidden_MH)
        assert torch.equal(bounded.experts_MK, counted.experts_MK)
        assert torch.equal(bounded.weights_MK, counted.weights_MK)


@torch.inference_mode()
def migrate(launch: Launch, path: Path, before: Placement, afters: list[Placement]) -> dict[str, Any]:
    """Passes go on while experts move: first to the first placement, then to the next."""
    job = load(launch, path, before)
    passes = []
    with job.group as group:
        migration = Migration(group, job.experts, before)
        for after in afters:
            migration.begin(after)
            while not migration.is_idle:
                agreed = int(group.all_gather(torch.tensor([migration.arrived])).min())
                for change in migration.switch(agreed):
                    job.layers.copies_L[change.layer] = Copies.of(
                        change.slot_to_expert_S, num_experts=before.num_experts, num_ranks=before.ranks
                    )
                passes.append([job.run(layer) for layer in range(len(LAYERS))])
        held = [sorted(job.experts.layer(layer)) for layer in range(len(LAYERS))]
        group.all_gather(torch.tensor([0]))
        migration.close()
        job.experts.close()
        return {"passes": passes, "held": held, "free": job.experts.num_free}


def test_experts_move_between_passes_and_every_pass_is_right(
    checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    before, *afters = [
        E8["replicas on 4"],
        placed([[7, 6, 5, 4, 3, 2, 1, 0, 0, 1, 2, 3]] * 2, 8, 4),
        E8["replicas on 4"],
    ]
    results = start_ranks(migrate, 4, tmp_path, path, before, afters).results()
    number = len(results[0]["passes"])
    assert number >= 2
    for turn in range(number):
        outputs = [result["passes"][turn] for result in results]
        assert largest_error(reference(path), outputs, 8, torch.float32) < 1e-5
    for rank, result in enumerate(results):
        assert result["held"] == [sorted(row) for row in experts_of(before, rank)]
        assert result["free"] == 9 - sum(map(len, result["held"]))


def test_the_memory_of_a_shard_is_that_of_its_slots(checkpoint: MakeCheckpoint) -> None:
    _, layout, _ = open_layout(checkpoint("qwen3_moe"))
    expert_bytes = 3 * HIDDEN * 32 * 4
    assert shard_bytes(layout.experts_LE, E8["replicas on 4"], spare_slots=3) == (2 * 3 + 3) * expert_bytes
