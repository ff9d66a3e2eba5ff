"""The gate: streamed experts give what plain transformers gives, all in memory, on each prompt alone.

Logits are compared by teacher forcing: the plain model runs once over the prompt and what Poise generated. Tokens are
compared with the plain model's own ``generate``, up to where two tokens are so close that rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from poise import LLM, SamplingParams
from poise.engine.runner import ForwardInputs
from poise.errors import BudgetError
from tests.conftest import DrawPrompts, MakeCheckpoint, OpenRunner, Reference

ARCHITECTURES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe"]
LENGTHS = (5, 41, 1, 17, 33, 9, 2)
"""Up to six chunks of eight; with two batches of two rows at once, three prompts wait."""
NEW_TOKENS = 8
FP32_TOLERANCE = 1e-5
RECURRENT_TOLERANCE = 1e-4
FP32_MARGIN = 1e-4
BF16_TOLERANCE = 0.02
"""Of the largest logit. Measured: medians of 0 to 0.007, and no position above 0.02 but where a router chose otherwise.

In bf16 two experts of nearly equal score may swap, in plain transformers as here (against fp32 each of them swaps in 0
to 18 % of the positions); that changes the logits by 0.1 to 0.5. Against plain bf16, 0 to 5 % of the positions differ so.
"""
BF16_SWAPPED_FRAC = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One prompt's way through Poise: logits_TV are those that chose ``new_ids``."""

    prompt_ids: list[int]
    new_ids: list[int]
    logits_TV: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """What plain transformers generates for one prompt, and how far its choice was ahead of the next best."""

    new_ids: list[int]
    margin_T: list[float]


Generate = Callable[..., list[Run]]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs prompts through Poise in small chunks and few rows, so that all that can happen to a prompt happens."""
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))
    monkeypatch.setattr("poise.plan.candidates.BATCH_SIZES", (2,))
    monkeypatch.setattr("poise.plan.candidates.NUM_BATCHES", (2,))

    def run(
        path: Path, prompts: Sequence[Sequence[int]], *, slots: int | None, ignore_eos: bool, **options: Any
    ) -> list[Run]:
        seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
        with LLM(path, memory="1GiB", expert_slots=slots, **options) as llm:
            results = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=ignore_eos),
                on_logits=lambda row, logits_V: seen[row.index].append(logits_V.float()),
            )
            assert llm.describe()["expert_slots"] == (slots or llm.describe()["experts"])
        return [
            Run(
                prompt_ids=list(result.prompt_token_ids),
                new_ids=list(result.outputs[0].token_ids),
                logits_TV=torch.stack(seen[result.index]),
            )
            for result in results
        ]

    return run


@pytest.fixture(scope="module")
def plain_generate() -> Callable[..., list[Plain]]:
    """The plain model's greedy generation for each prompt alone, made once per model."""
    made: dict[int, list[Plain]] = {}

    def one(model: Any, ids: Sequence[int]) -> Plain:
        prompt = torch.tensor([ids])
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best_T2 = torch.cat(result.logits).float().topk(2).values
        return Plain(
            new_ids=result.sequences[0, len(ids) :].tolist(), margin_T=(best_T2[:, 0] - best_T2[:, 1]).tolist()
        )

    def run(model: Any, prompts: Sequence[Sequence[int]]) -> list[Plain]:
        if id(model) not in made:
            made[id(model)] = [one(model, ids) for ids in prompts]
        return made[id(model)]

    return run


def errors_T(model: Any, run: Run) -> torch.Tensor:
    """Per generated position the largest difference to the plain logits, as a share of the largest of those."""
    with torch.no_grad():
        want_TV = model(torch.tensor([run.prompt_ids + run.new_ids])).logits[0, len(run.prompt_ids) - 1 : -1].float()
    return (run.logits_TV - want_TV).abs().amax(dim=1) / want_TV.abs().max()


def sure_tokens(plain: Plain, margin: float) -> list[int]:
    """The tokens before the first that was nearly another."""
    first = next((place for place, each in enumerate(plain.margin_T) if each <= margin), len(plain.new_ids))
    return plain.new_ids[:first]


@pytest.mark.parametrize("slots", [1, 3, None], ids=["one-slot", "three-slots", "all-resident"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_logits_and_greedy_tokens_equal_plain_transformers(
    architecture: str,
    slots: int | None,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    generate: Generate,
    plain_generate: Callable[..., list[Plain]],
) -> None:
    path = checkpoint(architecture)
    model, prompts = reference(path), draw_prompts(LENGTHS)
    runs = generate(path, prompts, slots=slots, ignore_eos=False)
    assert [run.prompt_ids for run in runs] == prompts
    assert max(float(errors_T(model, run).max()) for run in runs) <= FP32_TOLERANCE
    plains = plain_generate(model, prompts)
    for run, plain in zip(runs, plains, strict=True):
        sure = sure_tokens(plain, FP32_MARGIN)
        assert run.new_ids[: len(sure)] == sure
    sure_frac = sum(len(sure_tokens(plain, FP32_MARGIN)) for plain in plains) / sum(
        len(plain.new_ids) for plain in plains
    )
    assert sure_frac > 0.9, "the models of this test hardly ever choose clearly"


@pytest.mark.parametrize("architecture", ["qwen3_next", "jamba"])
def test_recurrent_models_equal_plain_transformers_whatever_the_chunk(
    architecture: str, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, generate: Generate
) -> None:
    """Their layers sum in chunks of their own, so where a prompt is cut changes the rounding; Jamba cannot be cut at all."""
    path = checkpoint(architecture)
    runs = generate(path, draw_prompts(LENGTHS), slots=3, ignore_eos=True)
    assert max(float(errors_T(reference(path), run).max()) for run in runs) <= RECURRENT_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_all_positions_of_two_padded_batches_equal_plain_transformers(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    open_runner: OpenRunner,
) -> None:
    path = checkpoint(architecture)
    runner, model = open_runner(path, slots=2), reference(path)
    groups = [draw_prompts((12, 7, 1)), draw_prompts((9, 9), seed=1)]
    results = runner.run([all_positions(runner.model.config, prompts) for prompts in groups])
    for prompts, logits_BTV in zip(groups, results, strict=True):
        assert logits_BTV.shape[:2] == (len(prompts), max(map(len, prompts)))
        for ids, logits_TV in zip(prompts, logits_BTV, strict=True):
            with torch.no_grad():
                want_TV = model(torch.tensor([ids])).logits[0]
            assert (logits_TV[-len(ids) :] - want_TV).abs().max() <= FP32_TOLERANCE * want_TV.abs().max()


def all_positions(config: Any, prompts: Sequence[Sequence[int]]) -> ForwardInputs:
    """A pass over whole prompts, left-padded to the longest, that keeps the logits of every position."""
    width = max(map(len, prompts))
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    arguments = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts]),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
        "past_key_values": DynamicCache(config=config),
        "use_cache": True,
        "logits_to_keep": 0,
    }
    return ForwardInputs(arguments=arguments, real_T=mask_BT.flatten().bool())


@pytest.mark.parametrize("slots", [1, 3], ids=["one-slot", "three-slots"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_as_close_to_plain_bf16_as_rounding_allows(
    architecture: str,
    slots: int,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    generate: Generate,
    plain_generate: Callable[..., list[Plain]],
) -> None:
    path = checkpoint(architecture, "bfloat16")
    model, exact, prompts = reference(path), reference(path, torch.float32), draw_prompts(LENGTHS)
    runs = generate(path, prompts, slots=slots, ignore_eos=True)
    error_T = torch.cat([errors_T(model, run) for run in runs])
    print(
        f"{architecture}: median {error_T.median():.4f}, above tolerance {(error_T > BF16_TOLERANCE).float().mean():.3f}"
    )
    assert error_T.median() <= BF16_TOLERANCE / 2
    assert (error_T > BF16_TOLERANCE).float().mean() <= BF16_SWAPPED_FRAC
    plain_runs = [
        Run(prompt_ids=run.prompt_ids, new_ids=run.new_ids, logits_TV=plain_logits(model, run)) for run in runs
    ]
    ours, theirs = (torch.cat([errors_T(exact, run) for run in each]).median() for each in (runs, plain_runs))
    assert ours <= 1.25 * theirs, "Poise is farther from fp32 than plain bf16 is"
    same = 0
    for run, plain in zip(runs, plain_generate(model, prompts), strict=True):
        sure = sure_tokens(plain, 2 * BF16_TOLERANCE * float(run.logits_TV.abs().max()))
        same += run.new_ids[: len(sure)] == sure
    assert same >= len(prompts) - 1, "a swap of experts may change one prompt's tokens, not several"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_in_the_smallest_budget_a_single_slot_is_left_and_logits_equal_plain_transformers(
    architecture: str, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts
) -> None:
    path = checkpoint(architecture)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    expected = [({"prompt_token_ids": ids}, params) for ids in draw_prompts(LENGTHS)]
    with pytest.raises(BudgetError) as refusal:
        LLM(path, memory=1, expected=expected)
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(expected))}
    with LLM(path, memory=refusal.value.smallest_bytes, expected=expected) as llm:
        results = llm.generate(
            [prompt for prompt, _ in expected],
            params,
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V.float()),
        )
        assert llm.describe()["expert_slots"] == 1
    for result in results:
        run = Run(
            prompt_ids=list(result.prompt_token_ids),
            new_ids=list(result.outputs[0].token_ids),
            logits_TV=torch.stack(seen[result.index]),
        )
        assert errors_T(reference(path), run).max() <= FP32_TOLERANCE


def plain_logits(model: Any, run: Run) -> torch.Tensor:
    """What the plain model would choose each of a run's tokens by."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([run.prompt_ids + run.new_ids])).logits
    return logits[0, len(run.prompt_ids) - 1 : -1].float()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_bf16_checkpoint_run_in_fp32_equals_plain_transformers_in_fp32(
    architecture: str, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, generate: Generate
) -> None:
    """The bytes on disk are not the weights here: every expert is converted on its way into its slot."""
    path = checkpoint(architecture, "bfloat16")
    runs = generate(path, draw_prompts(LENGTHS), slots=1, ignore_eos=True, dtype="float32")
    exact = reference(path, torch.float32)
    assert max(float(errors_T(exact, run).max()) for run in runs) <= FP32_TOLERANCE
