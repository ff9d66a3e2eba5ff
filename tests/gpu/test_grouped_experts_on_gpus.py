"""Experts computed all at once on a GPU (bf16): as one after the other, in any slots; and in ranks, beside plain transformers.

bf16 to 5 % of the largest logit in the median prompt, as rounding may turn a router's choice.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.parallel.grouped_experts import pays_on
from poise.parallel.step_options import StepOptions
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.gpu.gpu_ranks import errors, generate, plain
from tests.grouped_cases import layer_of
from tests.parallel.test_parallel_llm import Rotate
from tests.ranks import start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
LENGTHS = (5, 17, 9, 30, 3, 12, 8, 21)


@pytest.mark.parametrize(
    ("slots", "replicas", "tokens", "top_k"), [(9, 0, 1, 1), (9, 3, 700, 4), (900, 2, 40, 2), (2500, 0, 40, 9)]
)
def test_outputs_are_those_of_one_product_after_the_other(slots: int, replicas: int, tokens: int, top_k: int) -> None:
    layer = layer_of(7, slots=slots, replicas=replicas, tokens=tokens, top_k=top_k, device="cuda")
    made = layer.run()
    wanted_MH, size_MH = layer.one_by_one()
    assert ((made.partial_MH.float() - wanted_MH).abs() <= 0.02 * size_MH).all()
    for _ in range(3):
        assert torch.equal(layer.run().partial_MH, made.partial_MH), "sums depend on who comes first"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {"tokens": 8}),
        (2, {"tokens": 40, "policy": Rotate()}),
        (2, {"tokens": 16, "balance": "probe", "steps": StepOptions(predictor="last", rests=False)}),
    ],
)
def test_ranks_compute_their_experts_all_at_once(
    ranks: int, options: dict[str, Any], checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    assert pays_on(torch.device("cuda"))
    path, prompts = checkpoint("qwen3_moe", "bfloat16"), draw_prompts(LENGTHS)
    balanced = "balance" in options
    slow_ranks = range(ranks) if balanced else ()
    results = start_ranks(generate, ranks, tmp_path, path, prompts, dict(options), slow_ranks, 64).results(within_s=100)
    spans = {span for result in results for span in result["spans"]}
    assert "experts" in spans
    assert "expert" not in spans
    logits = {prompt: own for result in results for prompt, own in result["logits"].items()}
    assert set(logits) == {tuple(prompt) for prompt in prompts}
    of_prompts = errors(plain(path, torch.bfloat16), logits)
    print(f"{ranks} ranks: errors {of_prompts}")
    assert statistics.median(of_prompts) <= 5e-2
    if balanced:
        used = sum(record.note.replicas_used for result in results for record in result["records"])
        print(f"replicas used: {used}")
        assert used > 0, "no replica came"
    if "policy" in options:
        assert results[0]["moved"] > 0
