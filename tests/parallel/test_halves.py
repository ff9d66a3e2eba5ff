"""A pass in two halves gives what a pass in one gives, also where a rank only joins, and runs so only where it pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.engine.overlapped_pass import MIN_ROWS, Half, is_worth_it, run_halves, split
from poise.engine.parallel_llm import ParallelLLM
from poise.engine.parallel_runner import ParallelRunner
from poise.engine.runner import ForwardInputs
from poise.model.cache import make_cache
from poise.model.inspect import find_experts
from poise.model.seam import Parked
from poise.parallel.courier import Courier
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from poise.spec.placement import Placement, contiguous
from tests.conftest import VOCABULARY, MakeCheckpoint, Reference
from tests.parallel.test_expert_parallel import LAYERS, TOP_K, batches_of, largest_error, load
from tests.ranks import start_ranks

LONG = 210
"""Tokens of a row: five rows on one rank alone give each of 8 experts MIN_ROWS."""


@torch.inference_mode()
def run_in_halves(launch: Launch, path: Path, placement: Placement) -> list[list[torch.Tensor]]:
    """A batch in each half on rank 0, none at all on rank 1, one in the first half on rank 2."""
    job = load(launch, path, placement)
    outputs: list[list[torch.Tensor]] = [[] for _ in LAYERS]

    def half(number: int) -> Half:
        def batches(layer: int) -> list[Any]:
            return batches_of(launch.rank, layer, job.num_experts, job.dtype)[number : number + 1]

        def park(layer: int) -> Sequence[Parked]:
            return [Parked(job.modules[layer], *batch[:3]) for batch in batches(layer)]

        def resume(layer: int, arrived: Sequence[torch.Tensor]) -> None:
            outputs[layer] += arrived

        return Half(real=[batch[3] for batch in batches(0)], start=lambda: None, park=park, resume=resume)

    courier = Courier()
    with job.group:
        run_halves([half(0), half(1)], job.layers, courier, num_layers=len(LAYERS))
        courier.close()
        job.experts.close()
    return outputs


@pytest.mark.parametrize("ranks", [1, 3])
def test_halves_give_what_transformers_gives(
    ranks: int, checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    placement = contiguous(LAYERS, num_experts=8, ranks=ranks, slots_per_rank=-(-8 // ranks))
    outputs = start_ranks(run_in_halves, ranks, tmp_path, path, placement).results()
    assert [len(by_layer[0]) for by_layer in outputs] == [2, 0, 1][:ranks]
    assert largest_error(reference(path), outputs, 8, torch.float32) < 1e-5


def inputs(ids_BT: torch.Tensor, model: Any) -> ForwardInputs:
    return ForwardInputs(
        arguments={"input_ids": ids_BT, "past_key_values": make_cache(model), "use_cache": True, "logits_to_keep": 1},
        real_T=None,
    )


def run_passes(
    launch: Launch, path: Path, batches: list[torch.Tensor], device: str = "cpu"
) -> tuple[list[torch.Tensor], int, int]:
    """Rank 0 runs a pass over two long batches, then one over two short ones; the others join without tokens."""
    patience = Patience(start_s=60, behind_s=60)
    with ParallelLLM(path, launch, memory="2GiB", patience=patience, device=device, balance="static") as llm:
        model = llm.runner.model
        modules = find_experts(model, model.config.model_type)
        courier = Courier(llm.group.device)
        runner = ParallelRunner(
            model, modules, llm.group, llm.runner.layers, llm.runtime.migration, courier=courier, top_k=TOP_K
        )
        logits = []
        if launch.rank == 0:
            for tokens in (LONG, 3):
                run = runner.run([inputs(ids_BT[:, :tokens].to(llm.group.device), model) for ids_BT in batches])
                logits += [each.cpu() for each in run]
        runner.join()
        courier.close()
        if launch.rank > 0:
            llm.follow()
        return logits, runner.passes_in_halves, runner.passes


def test_a_pass_of_many_rows_runs_in_halves_and_a_rank_that_joins_agrees(
    checkpoint: MakeCheckpoint, reference: Reference, tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randint(3, VOCABULARY, (5, LONG), generator=generator) for _ in range(2)]
    results = start_ranks(run_passes, 2, tmp_path, path, batches).results(within_s=120)
    assert [each[1:] for each in results] == [(1, 2), (1, 2)]
    model = reference(path)
    given = [ids_BT[:, :tokens] for tokens in (LONG, 3) for ids_BT in batches]
    for logits, ids_BT in zip(results[0][0], given, strict=True):
        with torch.inference_mode():
            wanted = model(ids_BT, use_cache=False).logits[:, -1:]
        assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max()) + 1e-6


@pytest.mark.parametrize(("tokens", "first"), [([5, 5], 1), ([1, 1, 8], 2), ([8, 1, 1], 1), ([3, 3, 3, 3], 2)])
def test_halves_are_as_equal_as_may_be(tokens: list[int], first: int) -> None:
    assert split(tokens) == first


def test_halves_need_rows_enough_for_each_expert_and_two_batches_on_every_working_rank() -> None:
    enough = MIN_ROWS * 8 // 2 // 2
    assert is_worth_it([enough, enough], [True, True], top_k=2, num_experts=8)
    assert not is_worth_it([enough, enough - 1], [True, True], top_k=2, num_experts=8)
    assert is_worth_it([2 * enough, 0], [True, False], top_k=2, num_experts=8), "a rank that joins needs no tokens"
    assert not is_worth_it([2 * enough, 0], [True, True], top_k=2, num_experts=8)
