"""What a caller of ``generate`` gets: when sequences end, their text piece by piece, sampling that repeats, and Ctrl-C."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from poise import LLM, RequestOutput, SamplingParams
from poise.engine.choose import choose_token, make_generator
from poise.engine.text import TextStream
from poise.errors import PromptError, UsageError
from tests.conftest import DrawPrompts, MakeCheckpoint

CORPUS = [
    "def main():\n    print('hello')\n",
    "for word in text.split():\n    yield word, len(word)\n",
    "naïve café, 東京 🚀",
]
VOCABULARY = 320


def train_tokenizer() -> Any:
    """A byte-level BPE of 320 tokens: 3 special ones, 256 bytes, 61 merges."""
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer()


@pytest.fixture(scope="module")
def root(checkpoint: MakeCheckpoint, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    path = shutil.copytree(
        checkpoint("qwen3_moe", vocab_size=VOCABULARY), tmp_path_factory.mktemp("text"), dirs_exist_ok=True
    )
    tokenizer.save_pretrained(path)
    return Path(path)


@pytest.fixture
def llm(root: Path) -> Iterator[LLM]:
    with LLM(root, memory="1GiB", expert_slots=5) as opened:
        yield opened


def ids_of(results: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in results]


def given_ids(prompts: Sequence[Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def test_each_sequence_ends_at_its_own_end_token_and_the_others_go_on(
    llm: LLM, root: Path, tmp_path: Path, draw_prompts: DrawPrompts
) -> None:
    prompts = given_ids(draw_prompts((5, 11, 3, 8)))
    whole = ids_of(llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True)))
    ends = [whole[1][4], whole[3][0]]
    path = Path(shutil.copytree(root, tmp_path / "model"))
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    with LLM(path, memory="1GiB", expert_slots=5) as ending:
        results = ending.generate(prompts, SamplingParams(max_tokens=12))
        ignoring = ending.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert ids_of(ignoring) == whole
    for result, full in zip(results, whole, strict=True):
        first = next((place for place, token in enumerate(full) if token in ends), None)
        assert result.outputs[0].token_ids == (full if first is None else full[: first + 1])
        assert result.outputs[0].finish_reason == ("length" if first is None else "stop")
    assert {result.outputs[0].finish_reason for result in results} == {"length", "stop"}


def test_every_request_has_its_own_limit(llm: LLM, draw_prompts: DrawPrompts) -> None:
    limits = [3, 1, 9, 5]
    params = [SamplingParams(max_tokens=limit, ignore_eos=True) for limit in limits]
    results = llm.generate(given_ids(draw_prompts((4, 9, 2, 7))), params)
    assert [len(ids) for ids in ids_of(results)] == limits
    with pytest.raises(UsageError, match="2 sampling_params for 4 prompts"):
        llm.generate(given_ids(draw_prompts((4, 9, 2, 7))), params[:2])


def test_results_are_in_order_of_input_and_reported_as_they_finish(llm: LLM, draw_prompts: DrawPrompts) -> None:
    prompts = draw_prompts((2, 30, 9, 17, 1))
    told: list[RequestOutput] = []
    params = [SamplingParams(max_tokens=limit, ignore_eos=True) for limit in (9, 8, 1, 3, 5)]
    results = llm.generate(given_ids(prompts), params, on_result=told.append)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    assert [list(result.prompt_token_ids) for result in results] == prompts
    assert [result.index for result in told] != [0, 1, 2, 3, 4]
    assert sorted(told, key=lambda result: result.index) == results


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_streamed_pieces_join_to_the_final_text(temperature: float, llm: LLM, tokenizer: Any) -> None:
    """At a high temperature most of the text is broken UTF-8, which must wait for its end."""
    pieces: dict[int, list[str]] = {index: [] for index in range(6)}
    params = [SamplingParams(max_tokens=30, ignore_eos=True, temperature=temperature, seed=seed) for seed in range(6)]
    prompts = ["def main():", "for word", "naïve", "x", "東京", "yield len(word)"]
    results = llm.generate(prompts, params, on_text=lambda index, piece: pieces[index].append(piece))
    for result in results:
        text = result.outputs[0].text
        assert "".join(pieces[result.index]) == text
        assert text == tokenizer.decode(list(result.outputs[0].token_ids), skip_special_tokens=True)
        assert result.prompt == prompts[result.index]


def test_a_stop_string_ends_the_text_before_it_and_no_part_of_it_is_shown(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.5, seed=1)
    whole = llm.generate("def main():", params)[0].outputs[0]
    readable = [place for place in range(4, len(whole.text) - 4) if "\ufffd" not in whole.text[place : place + 3]]
    assert readable, "the sampled text has no three whole characters in a row"
    for place in readable[:6]:
        stop = whole.text[place : place + 3]
        pieces: list[tuple[int, str]] = []
        stopping = SamplingParams(
            max_tokens=40, ignore_eos=True, temperature=1.5, seed=1, stop=(stop, "never in this text")
        )
        completion = llm.generate("def main():", stopping, on_text=lambda *piece, to=pieces: to.append(piece))[
            0
        ].outputs[0]
        assert completion.text == whole.text[: whole.text.index(stop)] == "".join(piece for _, piece in pieces)
        assert completion.finish_reason == "stop"
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]


def test_a_text_that_is_too_long_is_refused_by_us_and_spoken_of_by_nobody_else(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    llm.tokenizer.model_max_length = 100
    with (
        caplog.at_level("WARNING", logger="transformers"),
        pytest.raises(PromptError, match="the model's context is 256"),
    ):
        llm.generate("def main():\n" * 200)
    assert not caplog.records


TOKENIZER = train_tokenizer()
ASCII = [token for token in range(3, VOCABULARY) if TOKENIZER.decode([token]).isascii()]


def show(tokens: Sequence[int], stops: tuple[str, ...]) -> tuple[str, int]:
    """What a stream shows of these tokens in all, and after how many tokens it stops."""
    stream = TextStream(TOKENIZER, stops)
    shown, used = "", 0
    for token in tokens:
        shown += stream.push(token)
        used += 1
        if stream.stopped:
            break
    return shown + stream.finish(tokens[:used]), used


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ASCII), max_size=30), st.data())
def test_text_is_shown_up_to_a_stop_string_and_ends_with_the_token_that_completes_it(
    tokens: list[int], data: st.DataObject
) -> None:
    text = TOKENIZER.decode(tokens)
    begin, size = data.draw(st.integers(0, len(text))), data.draw(st.integers(1, 6))
    stop = data.draw(st.sampled_from([text[begin : begin + size] or "nowhere", "aab", "  "]))
    shown, used = show(tokens, (stop,))
    assert shown == text.split(stop)[0]
    assert stop not in TOKENIZER.decode(tokens[: used - 1])
    assert used == len(tokens) or stop in TOKENIZER.decode(tokens[:used])


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (("for", "print"), "def main():\n    "),
        (("print", "for"), "def main():\n    "),
        (("()", "):"), "def main"),
        (("):", "()"), "def main"),
        (("nowhere", "():\n "), "def main"),
    ],
)
def test_of_several_stop_strings_the_leftmost_cuts_the_text(stops: tuple[str, ...], shown: str) -> None:
    text = "def main():\n    print('for')"
    assert show(TOKENIZER(text)["input_ids"], stops)[0] == shown


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_any_bytes_are_shown_as_the_tokenizer_decodes_them_and_never_half_a_character(tokens: list[int]) -> None:
    stream = TextStream(TOKENIZER, ())
    pieces = [stream.push(token) for token in tokens]
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + stream.finish(tokens) == stream.text == whole


def test_a_seed_repeats_whatever_else_runs_and_another_seed_differs(llm: LLM, draw_prompts: DrawPrompts) -> None:
    prompts = draw_prompts((6, 14, 3, 9, 1))

    def sample(seed: int | None) -> SamplingParams:
        return SamplingParams(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)

    alone = ids_of(llm.generate(given_ids(prompts[:1]), sample(7)))[0]
    together = ids_of(llm.generate(given_ids(prompts), [sample(7), sample(8), *[SamplingParams(max_tokens=4)] * 3]))
    assert together[0] == alone
    again = ids_of(llm.generate(given_ids([prompts[0]] * 4), [sample(7), sample(8), sample(None), sample(None)]))
    assert again[0] == alone
    assert len(set(again)) == 4


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (0.7, None, 0.8), (1.5, 9, 0.6), (1.0, None, 1.0)]
)
def test_filters_agree_with_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    config = transformers.GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k or 0, top_p=top_p)
    logits_BV = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) * 3
    generator, same = make_generator(params), make_generator(params)
    assert generator is not None
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(config.temperature),
            *([transformers.TopKLogitsWarper(config.top_k)] if config.top_k else []),
            *([transformers.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []),
        ]
    )
    for logits_V in logits_BV:
        allowed_V = processors(torch.empty(1, 0, dtype=torch.long), logits_V[None] / 1.0)[0].softmax(-1)
        token = choose_token(logits_V, params, generator)
        assert allowed_V[token] > 0
        assert token == int(torch.multinomial(allowed_V, 1, generator=same))
        if top_k is not None:
            assert token in logits_V.topk(top_k).indices


def test_sampling_follows_the_model_s_probabilities() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    params = SamplingParams(temperature=1.0, seed=0)
    generator = make_generator(params)
    counts = torch.bincount(torch.tensor([choose_token(logits_V, params, generator) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, logits_V.exp(), atol=0.03)


@pytest.mark.parametrize("listener", ["on_progress", "on_text", "on_result", "on_logits"])
def test_ctrl_c_leaves_the_llm_usable_and_no_thread_after_closing(
    listener: str, root: Path, draw_prompts: DrawPrompts
) -> None:
    before = sum(thread.name.startswith("poise-reader") for thread in threading.enumerate())
    prompts = given_ids(draw_prompts((5, 9, 3)))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with LLM(root, memory="1GiB", expert_slots=3) as llm:
        expected = ids_of(llm.generate(prompts, params))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, **{listener: interrupt})
        assert ids_of(llm.generate(prompts, params)) == expected
    assert sum(thread.name.startswith("poise-reader") for thread in threading.enumerate()) == before
