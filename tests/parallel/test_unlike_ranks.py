"""Ranks whose processors may divide tokens differently tell each other how many rows come, and outputs stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.parallel import step_balance
from poise.parallel.exchange import TokenExchange
from poise.parallel.launch import Launch
from poise.parallel.moe_layer import LayerRecord
from poise.parallel.step_options import StepOptions
from poise.parallel.step_planner import StepPlanner
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parallel.test_parallel_llm import PATIENT, expected
from tests.parallel.test_probe import dawdle_in
from tests.ranks import start_ranks

TOKENS = 12


def generate(launch: Launch, path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Rank 1 has another arithmetic, by which it divides the same tokens over the same copies differently."""
    headers, divided, records = [], [], list[LayerRecord]()
    ask, divide = TokenExchange._headers, StepPlanner.dispatch

    def asked(self: TokenExchange, sent_R: tuple[int, ...], layer: int) -> Any:
        headers.append(layer)
        return ask(self, sent_R, layer)

    def otherwise(
        self: StepPlanner, layer: int, counts_RE: Any, came_N3: Any, in_R: Any, out_R: Any, *, rank: int
    ) -> Any:
        usual = divide(self, layer, counts_RE, came_N3, in_R, out_R, rank=rank)
        if launch.rank == 0 or usual is None:
            return usual
        skewed_RE = counts_RE * np.where(np.arange(counts_RE.shape[1]) % 2, 3, 1)
        other = divide(self, layer, skewed_RE, came_N3, in_R, out_R, rank=rank)
        assert other is not None
        divided.append(not np.array_equal(usual[1], other[1]))
        return other

    TokenExchange._headers = asked  # type: ignore[method-assign]
    StepPlanner.dispatch = otherwise  # type: ignore[method-assign]
    if launch.rank == 1:
        step_balance.arithmetic = lambda: 12345  # type: ignore[attr-defined]
    steps = StepOptions(predictor="last", rests=False)
    with ParallelLLM(
        path, launch, memory="2GiB", patience=PATIENT, balance="probe", steps=steps, groups=[(4, 2)]
    ) as llm:
        layers = llm.runner.layers
        layers.on_record = records.append
        dawdle_in(llm.runner.model, 3e-3)
        made = []
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return {
        "tokens": [list(each.outputs[0].token_ids) for each in made],
        "headers": len(headers),
        "divided_otherwise": sum(divided),
        "replicas": sum(record.note.replicas_used for record in records),
        "pairs": sum(record.routed_tokens for record in records),
        "own": sum(record.note.home_pairs for record in records),
    }


def test_ranks_that_divide_differently_give_the_tokens_of_one_process(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9, 30, 3, 12, 8, 21))
    results = start_ranks(generate, 2, tmp_path, path, prompts).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, TOKENS) for prompt in prompts]
    assert sum(result["replicas"] for result in results) > 0, "no replica came, so that nothing was tested"
    assert results[1]["divided_otherwise"] > 0, "ranks were of one mind, so that nothing was tested"
    assert results[0]["headers"] == results[1]["headers"] > 0
    assert sum(result["pairs"] for result in results) == sum(result["own"] for result in results)
