"""A pass in two halves gives what a pass in one gives, also where a rank only joins, and runs so only where it pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.engine.overlapped_pass import MIN_ROWS, Half, is_worth_it, run_halves, split
from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.model.seam import Parked
from poise.parallel.courier import Courier
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from poise.spec.placement import Placement, contiguous
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parallel.test_expert_parallel import LAYERS, batches_of, largest_error, load
from tests.ranks import start_ranks


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


def generate(launch: Launch, path: Path, prompts: list[list[int]]) -> tuple[list[list[int]], int, int]:
    with ParallelLLM(path, launch, memory="2GiB", groups=[(4, 2)], patience=Patience(start_s=60, behind_s=60)) as llm:
        tokens: list[list[int]] = []
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
            tokens = [list(each.outputs[0].token_ids) for each in results]
        return tokens, llm.runner.passes_in_halves, llm.runner.passes


def test_long_prompts_are_read_in_halves_and_tokens_decoded_in_one(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts([140] * 16, seed=2)
    results = start_ranks(generate, 2, tmp_path, path, prompts).results(within_s=120)
    model = reference(path)
    with torch.inference_mode():
        wanted = model.generate(torch.tensor(prompts), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert results[0][0] == wanted[:, 140:].tolist()
    for _, in_halves, passes in results:
        assert 0 < in_halves < passes
    assert results[0][1:] == results[1][1:], "ranks agree"


@pytest.mark.parametrize(("tokens", "first"), [([5, 5], 1), ([1, 1, 8], 2), ([8, 1, 1], 1), ([3, 3, 3, 3], 2)])
def test_halves_are_as_equal_as_may_be(tokens: list[int], first: int) -> None:
    assert split(tokens) == first


def test_halves_need_rows_enough_for_each_expert_and_two_batches_on_every_working_rank() -> None:
    enough = MIN_ROWS * 8 // 2 // 2
    assert is_worth_it([enough, enough], [True, True], top_k=2, num_experts=8)
    assert not is_worth_it([enough, enough - 1], [True, True], top_k=2, num_experts=8)
    assert is_worth_it([2 * enough, 0], [True, False], top_k=2, num_experts=8), "a rank that joins needs no tokens"
    assert not is_worth_it([2 * enough, 0], [True, True], top_k=2, num_experts=8)
