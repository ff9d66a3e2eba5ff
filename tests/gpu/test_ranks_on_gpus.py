"""Expert-parallel runs on GPUs give what plain transformers gives there, while experts move and replicas come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.engine.vibe import Vibe
from poise.parallel.step_options import StepOptions
from poise.plan.rebalance import Eplb
from tests.conftest import VOCABULARY, DrawPrompts, MakeCheckpoint
from tests.gpu.gpu_ranks import generate, greedy, largest_error, plain
from tests.parallel.test_halves import LONG, run_passes
from tests.parallel.test_parallel_llm import Rotate
from tests.ranks import start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
LENGTHS = (5, 17, 9, 30, 3, 12, 8, 21)


def check(
    ranks: int,
    options: dict[str, Any],
    path: Path,
    prompts: list[list[int]],
    directory: Path,
    slow_ranks: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Tokens and logits; returns what the ranks tell."""
    results = start_ranks(generate, ranks, directory, path, prompts, options, slow_ranks).results(within_s=100)
    model = plain(path)
    assert results[0]["tokens"] == [greedy(model, prompt, options["tokens"]) for prompt in prompts]
    logits = {prompt: own for result in results for prompt, own in result["logits"].items()}
    assert set(logits) == {tuple(prompt) for prompt in prompts}
    assert largest_error(model, logits) < 1e-5
    assert all(0 < result["peak"] < 2 << 30 for result in results)
    return results


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_one_rank_by_nccl(
    architecture: str, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    (result,) = check(1, {"tokens": 8}, checkpoint(architecture), draw_prompts(LENGTHS), tmp_path)
    assert result["exchanges"] == "nccl"
    assert {"attention", "expert", "dispatch", "combine"} <= result["spans"]
    assert all(record.compute_s > 0 and record.dispatch_s > 0 for record in result["records"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_a_gpu_exchange_through_host_memory(
    ranks: int, checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    results = check(ranks, {"tokens": 8}, checkpoint("qwen3_moe"), draw_prompts(LENGTHS), tmp_path)
    if ranks > torch.cuda.device_count():
        assert {result["exchanges"] for result in results} == {"gloo through host memory"}


@pytest.mark.parametrize(
    ("ranks", "policy", "slow_ranks"), [(4, Eplb(interval=4), ()), (2, Rotate(), ()), (4, Vibe(interval=2), (2,))]
)
def test_experts_move_between_gpus_while_tokens_are_generated(
    ranks: int,
    policy: Any,
    slow_ranks: Sequence[int],
    checkpoint: MakeCheckpoint,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    options = {"tokens": 40, "policy": policy}
    results = check(ranks, options, checkpoint("qwen3_moe"), draw_prompts(LENGTHS), tmp_path, slow_ranks)
    assert results[0]["moved"] > 0, "nothing moved, so that nothing was tested"


@pytest.mark.parametrize(
    ("ranks", "steps", "policy"),
    [
        (2, StepOptions(predictor="last", rests=False), None),
        (4, StepOptions(predictor="gate", rests=False, ahead="inline"), None),
        (4, StepOptions(predictor="gate", rests=False, ahead="thread", online=True), Rotate()),
        (4, StepOptions(predictor="none", rests=False), None),
        (4, StepOptions(predictor="last", suspends=False, chunk_bytes=1000, rests=False), Rotate()),
    ],
)
def test_replicas_come_to_gpus_while_tokens_are_generated(
    ranks: int,
    steps: StepOptions,
    policy: Any,
    checkpoint: MakeCheckpoint,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    options = {"tokens": 16, "balance": "probe", "steps": steps, "policy": policy}
    everyone = range(ranks)
    results = check(ranks, options, checkpoint("qwen3_moe"), draw_prompts(LENGTHS), tmp_path, everyone)
    records_R = [result["records"] for result in results]
    assert sum(record.note.replicas_used for records in records_R for record in records) > 0, "no replica came"
    for layer in zip(*records_R, strict=True):
        if not any(record.note.late for record in layer):
            routed = sum(record.routed_tokens for record in layer)
            assert sum(record.note.own_pairs for record in layer) in (0, routed), "all, or nobody was asked"
    if policy is not None:
        assert results[0]["moved"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_passes_in_halves(ranks: int, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Exchanges of one half run behind the other's experts, on another stream."""
    path, generator = checkpoint("qwen3_moe"), torch.Generator().manual_seed(4)
    batches = [torch.randint(3, VOCABULARY, (5, LONG), generator=generator) for _ in range(2)]
    results = start_ranks(run_passes, ranks, tmp_path, path, batches, "cuda").results(within_s=100)
    assert [each[1:] for each in results] == [(1, 2)] * ranks
    model = plain(path)
    given = [ids_BT[:, :tokens] for tokens in (LONG, 3) for ids_BT in batches]
    for logits, ids_BT in zip(results[0][0], given, strict=True):
        with torch.inference_mode():
            wanted = model(ids_BT.to("cuda"), use_cache=False).logits[:, -1:].cpu()
        assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_one_rank_by_nccl_balances_its_steps(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    check(1, {"tokens": 8, "balance": "probe"}, checkpoint("qwen3_moe"), draw_prompts(LENGTHS), tmp_path)
