"""A model over several ranks gives the tokens that plain transformers gives on each prompt alone."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import poise
from poise.engine.footprint import available_bytes
from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.engine.vibe import Vibe
from poise.model.inspect import find_experts
from poise.parallel.launch import Launch
from poise.parallel.watch import Patience
from poise.plan.rank_costs import RankCosts
from poise.plan.rebalance import Eplb, Outcome, Planner, Proposal, Rebalance, Window
from poise.spec.placement import Placement
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.ranks import start_ranks

PATIENT = Patience(start_s=60, behind_s=60)


def generate(launch: Launch, path: Path, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Two calls in a row, so that the second begins where the first left the group."""
    finished: list[int] = []
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, **options) as llm:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        if launch.rank > 0:
            llm.follow()
            return {"passes": llm.runner.passes, "progress": llm.last_progress}
        first = llm.generate(asked, params, on_result=lambda result: finished.append(result.index))
        again = llm.generate(asked[:1], params)
        return {
            "tokens": [list(each.outputs[0].token_ids) for each in first],
            "again": [list(each.outputs[0].token_ids) for each in again],
            "finished": finished,
            "progress": llm.last_progress,
            "passes": llm.runner.passes,
            "facts": llm.describe(),
        }


def expected(model: Any, prompt: list[int], tokens: int = 6) -> list[int]:
    """Greedy, by whole forwards; a token that ends sequences is a token like others."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return [int(token) for token in ids[0, len(prompt) :]]


@pytest.mark.parametrize(
    ("architecture", "ranks", "options"),
    [
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 2, {"groups": [(2, 2)], "balance": "static"}),
        ("qwen3_moe", 4, {"redundant_slots": 1}),
        pytest.param("deepseek_v3", 2, {}, marks=pytest.mark.slow),
        pytest.param("qwen3_next", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_each_prompt_alone(
    architecture: str,
    ranks: int,
    options: dict[str, Any],
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    path, prompts = checkpoint(architecture), draw_prompts((5, 17, 9, 30, 3, 12, 8))
    results = start_ranks(generate, ranks, tmp_path, path, prompts, options).results(within_s=120)
    wanted = [expected(reference(path), prompt) for prompt in prompts]
    assert results[0]["tokens"] == wanted
    assert results[0]["again"] == wanted[:1]
    assert sorted(results[0]["finished"]) == list(range(len(prompts)))
    assert all(result["progress"] is None for result in results[1:])
    assert len({result["passes"] for result in results}) == 1, "all ranks take part in every pass"
    assert results[0]["progress"].generated_tokens == 6
    named = options.get("balance", "static" if ranks == 1 else "probe")
    assert results[0]["facts"]["balance"] == named
    assert results[0]["facts"]["slots_per_rank"] == -(-8 // ranks) + options.get("redundant_slots", 0)


def test_more_ranks_than_requests(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((11,))
    results = start_ranks(generate, 4, tmp_path, path, prompts, {"balance": "static"}).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompts[0])]


def generate_balanced(
    launch: Launch,
    path: Path,
    prompts: list[list[int]],
    policy: Rebalance,
    slow_rank: int | None = None,
    tokens: int = 40,
) -> dict[str, Any]:
    """``slow_rank`` takes 3 ms longer for each expert."""
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, policy=policy) as llm:
        if launch.rank == slow_rank:
            model = llm.runner.model
            for module in find_experts(model, model.config.model_type):
                model.get_submodule(module.name).act_fn.register_forward_pre_hook(lambda *_: time.sleep(0.003))
        balancing = llm.balancing
        assert balancing is not None
        if launch.rank > 0:
            llm.follow()
            return {"history": balancing.history, "figures": balancing.figures}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return {
            "tokens": [list(each.outputs[0].token_ids) for each in made],
            "history": balancing.history,
            "figures": balancing.figures,
            "table": balancing.table(),
        }


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Every expert moves on, again and again: the most that a policy can ask for."""

    interval: int = 4
    outcomes: tuple[Outcome | None, ...] = ()

    def start(self, curves: RankCosts | None) -> Planner:
        return self

    def propose(self, window: Window) -> Proposal:
        return Proposal(slot_to_expert_LS=np.roll(window.current_LS, 1, axis=1), reason="turning", gain_frac=None)


@pytest.mark.parametrize("policy", [Eplb(interval=4), Rotate()])
def test_experts_move_while_tokens_are_generated_and_the_tokens_stay_the_same(
    policy: Rebalance, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9))
    results = start_ranks(generate_balanced, 4, tmp_path, path, prompts, policy).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, 40) for prompt in prompts]
    changes = [(each.at_pass, each.moved_experts) for each in results[0]["history"]]
    assert sum(moved for _, moved in changes) > 0, "nothing moved, so that nothing was tested"
    for result in results[1:]:
        assert [(each.at_pass, each.moved_experts) for each in result["history"]] == changes
    for change, line, moved in zip(
        results[0]["history"], results[0]["table"][::2], results[0]["table"][1::2], strict=True
    ):
        assert line.startswith(f"pass {change.at_pass}: {change.moved_experts} experts moved")
        assert len(change.moves) == change.moved_experts
        layer, expert, source, to = change.moves[0]
        assert f"layer {layer}: {expert} from {source} to {to}" in moved
    assert "(of other work: " in results[0]["table"][0], "the first window has the prompts"
    windows = results[0]["figures"]
    assert len(windows) == 10
    assert all(each.imbalance >= 1.0 and len(each.expert_s_R) == 4 for each in windows)


@pytest.mark.parametrize("policy", [Eplb(interval=4), Vibe(interval=1)])
def test_one_rank_may_balance_too(
    policy: Rebalance, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 9))
    (result,) = start_ranks(generate_balanced, 1, tmp_path, path, prompts, policy).results(within_s=120)
    assert result["tokens"] == [expected(reference(path), prompt, 40) for prompt in prompts]
    assert sum(each.moved_experts for each in result["history"]) == 0, "there is no other rank"


def test_vibe_relieves_a_slow_rank_while_tokens_are_generated_and_they_stay_the_same(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 9, 3, 7, 4, 6, 8, 5, 9, 3, 7, 4))
    results = start_ranks(generate_balanced, 4, tmp_path, path, prompts, Vibe(interval=2), 2, 60).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, 60) for prompt in prompts]
    change = results[0]["history"][0]
    assert change.moved_experts > 0
    assert change.gain_frac > 0.03
    assert ", because " in results[0]["table"][0]
    figures = results[0]["figures"]
    before, after = (
        [each for each in figures if condition(each.last_pass)]
        for condition in (lambda last: last <= change.at_pass, lambda last: last > 50)
    )
    slow_s, relieved_s = (np.median([each.expert_s_R[2] for each in some]) for some in (before, after))
    assert relieved_s < 0.9 * slow_s


def budget(launch: Launch, path: Path) -> int:
    with ParallelLLM(path, launch, patience=PATIENT, balance="static") as llm:
        if launch.rank > 0:
            llm.follow()
        return llm.budget_bytes


def test_ranks_of_one_host_share_its_memory(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    free_bytes = available_bytes()
    budgets = start_ranks(budget, 3, tmp_path, checkpoint("qwen3_moe")).results(within_s=120)
    assert all(free_bytes / 5 < each < free_bytes / 2.5 for each in budgets)


def refuse(
    launch: Launch, path: Path, memory: str, on_rank_1: dict[str, Any], version_on_rank_1: str | None = None
) -> None:
    differs = launch.rank == 1
    if differs and version_on_rank_1 is not None:
        poise.__version__ = version_on_rank_1
    options = {"dtype": "float32"} | (on_rank_1 if differs else {})
    ParallelLLM(path, launch, memory=memory, patience=PATIENT, **options).close()


def test_a_part_that_does_not_fit_is_refused_in_one_line(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ranks = start_ranks(refuse, 2, tmp_path, checkpoint("qwen3_moe"), "1MiB", {})
    assert ranks.wait() == [2, 2]
    (line,) = ranks.output(0).splitlines()
    assert line.startswith("error: a memory budget of 1 MiB is too small; the smallest that works is")


def open_one(launch: Launch, path_R: list[Path]) -> None:
    ParallelLLM(path_R[launch.rank], launch, memory="2GiB", patience=PATIENT).close()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_do_not_wait_for_a_rank_that_cannot_start(
    rank: int, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    paths = [checkpoint("qwen3_moe")] * 3
    paths[rank] = tmp_path / "nothing"
    ranks = start_ranks(open_one, 3, tmp_path, paths)
    assert ranks.wait(within_s=20) == [2, 2, 2]
    reason = f"no such model directory: {tmp_path / 'nothing'}"
    assert ranks.output(rank).startswith(f"error: {reason}")
    for other in {0, 1, 2} - {rank}:
        (line,) = ranks.output(other).splitlines()
        assert line.startswith(f"error: rank {rank} gave up: {reason}")


SWAPPED = Placement(
    slot_to_expert_LS=np.array([[0, 1, 2, 4, 3, 5, 6, 7]] * 2, dtype=np.int32), layers=(0, 1), num_experts=8, ranks=2
)


@pytest.mark.parametrize(
    ("on_rank_1", "version", "message"),
    [
        (
            {"dtype": "bfloat16"},
            None,
            "rank 1 has dtype torch.bfloat16, rank 0 has torch.float32; give every rank the same options",
        ),
        ({"placement": SWAPPED}, None, r"rank 1 has placement \w+, rank 0 has \w+; give every rank the same placement"),
        ({}, "0.0.0", r"rank 1 has poise 0\.0\.0, rank 0 has [\w.]+; install one version on every machine"),
    ],
)
def test_ranks_that_do_not_run_the_same_are_refused(
    on_rank_1: dict[str, Any], version: str | None, message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    ranks = start_ranks(refuse, 2, tmp_path, checkpoint("qwen3_moe"), "2GiB", on_rank_1, version)
    assert ranks.wait() == [2, 2]
    assert re.fullmatch(f"error: {message}\n", ranks.output(0))
