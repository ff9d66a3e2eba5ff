"""The seam: forwards that park at their experts, run in lockstep, padded, chunked, broken off and cleaned up."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import greenlet
import pytest
import torch
from transformers import DynamicCache

from poise.engine.batch import Row
from poise.engine.loop import Listeners, Loop, OnProgress
from poise.engine.runner import ForwardInputs, Runner
from poise.engine.sampling import SamplingParams
from poise.model.seam import Forward
from poise.plan.group import GroupShape
from tests.conftest import DrawPrompts, MakeCheckpoint, OpenRunner, Reference

ATTENTION = ["mixtral", "mixtral_sliding", "gpt_oss"]
RECURRENT = ["qwen3_next", "jamba"]
TOLERANCE = dict.fromkeys(ATTENTION, 1e-5) | dict.fromkeys(RECURRENT, 1e-4)
"""Of the largest logit. Linear attention in chunks sums in another order than in one piece: 1.3e-5 was measured."""


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    num_batches: int,
    chunk: int,
    new_tokens: Sequence[int] | int = 4,
    on_pass: OnProgress | None = None,
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy, with this shape of batches. Of every prompt: its ids and the new ones, and the logits that chose those."""
    group = GroupShape(
        batch_size=batch_size, num_batches=num_batches, chunk_tokens=chunk, pass_tokens=batch_size * num_batches * chunk
    )
    lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    rows = [
        Row(index, ids, SamplingParams(max_tokens=length, ignore_eos=True), None)
        for index, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    seen: dict[int, list[torch.Tensor]] = {row.index: [] for row in rows}
    loop = Loop(runner, group, rows, eos=frozenset(), pad_id=0, device=torch.device("cpu"))
    loop.run(
        Listeners(
            on_row=lambda row: None,
            on_progress=on_pass,
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V.clone()),
        )
    )
    return [([*row.prompt_ids, *row.token_ids], torch.stack(seen[row.index])) for row in rows]


def worst_error(made: Sequence[tuple[list[int], torch.Tensor]], model: Any) -> float:
    """Largest difference to the plain model, run on each sequence alone, as a share of its largest logit."""
    worst = 0.0
    for ids, got in made:
        with torch.no_grad():
            want = model(torch.tensor([ids])).logits[0, -1 - len(got) : -1]
        assert not got.isnan().any()
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return worst


def prefill(runner: Runner, ids: Sequence[int]) -> ForwardInputs:
    """A pass over one whole prompt without padding."""
    arguments = {
        "input_ids": torch.tensor([ids]),
        "past_key_values": DynamicCache(config=runner.model.config),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    return ForwardInputs(arguments=arguments, real_T=None)


def suspended() -> list[greenlet.greenlet]:
    """Every greenlet of this process that stands somewhere in a forward: none of them main, none of them running."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), greenlet.greenlet)]
    return [each for each in found if each.parent is not None and each.gr_frame is not None]


@pytest.mark.parametrize("architecture", ATTENTION + RECURRENT)
def test_decoding_with_every_kind_of_cache_equals_the_plain_forward(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    open_runner: OpenRunner,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint(architecture)
    made = generate(open_runner(path), draw_prompts((20, 20)), batch_size=2, num_batches=1, chunk=64, new_tokens=12)
    assert worst_error(made, reference(path)) < TOLERANCE[architecture]


@pytest.mark.parametrize("architecture", ATTENTION + RECURRENT)
def test_left_padded_rows_equal_each_row_alone(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    open_runner: OpenRunner,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint(architecture)
    made = generate(open_runner(path), draw_prompts((23, 1, 9, 4)), batch_size=4, num_batches=1, chunk=64)
    assert worst_error(made, reference(path)) < TOLERANCE[architecture]


@pytest.mark.parametrize("architecture", [*ATTENTION, "qwen3_next"])
def test_a_row_may_be_padding_for_whole_chunks(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    open_runner: OpenRunner,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint(architecture)
    made = generate(open_runner(path), draw_prompts((31, 2, 11)), batch_size=3, num_batches=1, chunk=5)
    assert worst_error(made, reference(path)) < TOLERANCE[architecture]


@pytest.mark.parametrize("architecture", ATTENTION + RECURRENT)
def test_a_batch_prefills_while_another_decodes(
    architecture: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    open_runner: OpenRunner,
    draw_prompts: DrawPrompts,
) -> None:
    """Two rows at once and four prompts: when one ends, the next prefills beside the one that still decodes."""
    path = checkpoint(architecture)
    runner = open_runner(path, slots=3)
    passes: list[list[int]] = [[]]
    runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes[-1].append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = generate(
        runner,
        draw_prompts((12, 7, 6, 3)),
        batch_size=1,
        num_batches=2,
        chunk=64,
        new_tokens=(9, 2, 4, 3),
        on_pass=lambda progress: passes.append([]),
    )
    assert [1, 6] in passes
    assert [1, 3] in passes
    assert worst_error(made, reference(path)) < TOLERANCE[architecture]


def test_a_model_with_one_moe_layer_asks_for_its_experts_in_every_pass(
    checkpoint: MakeCheckpoint, reference: Reference, open_runner: OpenRunner, draw_prompts: DrawPrompts
) -> None:
    path = checkpoint("mixtral", num_hidden_layers=1)
    made = generate(open_runner(path), draw_prompts((6, 3)), batch_size=1, num_batches=2, chunk=64)
    assert worst_error(made, reference(path)) < 1e-5


def test_an_abort_ends_every_parked_forward_and_leaves_nothing_to_the_garbage_collector(
    checkpoint: MakeCheckpoint, reference: Reference, open_runner: OpenRunner, draw_prompts: DrawPrompts
) -> None:
    path = checkpoint("qwen3_moe")
    runner = open_runner(path)
    prompts = draw_prompts((5, 6, 7))
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            forwards = [
                Forward(lambda ids=ids: runner.model(**prefill(runner, ids).arguments).logits) for ids in prompts
            ]
            parked = [forward.start() for forward in forwards[:2]]
            assert len(suspended()) == 2
            held = [weakref.ref(each.hidden_TH) for each in parked if each is not None]
            del parked
            for forward in forwards:
                forward.abort()
                forward.abort()
        del forwards, forward
        assert suspended() == []
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()
    assert worst_error(generate(runner, prompts, batch_size=3, num_batches=1, chunk=64), reference(path)) < 1e-5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_forward_aborts_all_others_and_the_next_pass_is_right(
    error: type[BaseException],
    failing: int,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    open_runner: OpenRunner,
    draw_prompts: DrawPrompts,
) -> None:
    path = checkpoint("qwen3_moe")
    runner = open_runner(path, slots=3)
    prompts = draw_prompts((5, 6, 7))
    reached: list[int] = []

    def fail(*_: Any) -> None:
        reached.append(len(suspended()))
        if len(reached) == failing + 1:
            raise error("out of order")

    hook = runner.model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="out of order"):
        runner.run([prefill(runner, ids) for ids in prompts])
    hook.remove()
    assert len(reached) == failing + 1
    assert max(reached) == 2, "the other forwards should have been parked"
    assert suspended() == []
    made = generate(runner, prompts, batch_size=1, num_batches=3, chunk=64)
    assert worst_error(made, reference(path)) < 1e-5


def test_an_error_before_the_first_experts_leaves_no_forward_behind(
    checkpoint: MakeCheckpoint, open_runner: OpenRunner, draw_prompts: DrawPrompts
) -> None:
    runner = open_runner(checkpoint("mixtral"))
    group = [prefill(runner, ids) for ids in draw_prompts((5, 6))]
    broken = ForwardInputs(arguments={**group[1].arguments, "input_ids": torch.tensor([[10_000]])}, real_T=None)
    with pytest.raises(IndexError):
        runner.run([group[0], broken])
    assert suspended() == []
    assert runner.run([prefill(runner, [5, 6, 7])])[0].shape == (1, 1, runner.model.config.vocab_size)


def test_context_variables_reach_the_forward_and_do_not_leak_out(
    checkpoint: MakeCheckpoint, open_runner: OpenRunner, draw_prompts: DrawPrompts
) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody's")
    runner = open_runner(checkpoint("mixtral"))
    seen: list[str] = []

    def look(*_: Any) -> None:
        seen.append(request.get())
        request.set("the forward's")

    runner.model.model.layers[-1].register_forward_pre_hook(look)
    token = request.set("the caller's")
    runner.run([prefill(runner, ids) for ids in draw_prompts((3, 4))])
    assert seen == ["the caller's", "the caller's"]
    assert request.get() == "the caller's"
    request.reset(token)


def test_inference_mode_holds_inside_every_forward_and_ends_with_the_pass(
    checkpoint: MakeCheckpoint, open_runner: OpenRunner, draw_prompts: DrawPrompts
) -> None:
    runner = open_runner(checkpoint("mixtral"))
    modes: list[tuple[bool, bool]] = []
    runner.model.model.layers[-1].register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    logits = runner.run([prefill(runner, ids) for ids in draw_prompts((3, 4))])
    assert modes == [(True, False), (True, False)]
    assert all(each.is_inference() for each in logits)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_model_called_outside_poise_says_how_to_run_it(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> None:
    runner = open_runner(checkpoint("mixtral"))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"run it through poise\.LLM"):
        runner.model(torch.tensor([[5, 6]]))
