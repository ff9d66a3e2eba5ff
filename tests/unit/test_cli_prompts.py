"""Prompts from arguments and files: what is accepted, and which line a refusal names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.cli.prompts import PromptRequest, read_requests
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.5, top_k=9, seed=3, stop=("END",), ignore_eos=True)


def requests_of(tmp_path: Path, content: str | bytes, name: str = "in.jsonl") -> list[PromptRequest]:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_requests((), str(file), DEFAULTS)


def refusal_of(tmp_path: Path, content: str | bytes, name: str = "in.jsonl") -> str:
    with pytest.raises(PromptError) as refusal:
        requests_of(tmp_path, content, name)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 400
    return message.removeprefix(f"{tmp_path}/")


def test_arguments_are_prompts_with_the_parameters_of_the_command_line() -> None:
    requests = read_requests(["a b", "c"], None, DEFAULTS)
    assert [request.for_engine() for request in requests] == ["a b", "c"]
    assert {request.sampling for request in requests} == {DEFAULTS}


def test_a_line_overrides_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    line = {"prompt": "x", "max_tokens": 1, "temperature": 1, "top_p": 0.5, "top_k": None, "seed": None, "stop": "."}
    plain, changed, listed = requests_of(
        tmp_path, f'{{"prompt": "y"}}\n{json.dumps(line)}\n{{"prompt": "z", "stop": ["a", "b"]}}\n'
    )
    assert plain.sampling == DEFAULTS
    assert changed.sampling == SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, stop=(".",), ignore_eos=True)
    assert listed.sampling.stop == ("a", "b")


def test_token_ids_and_the_users_own_ids_come_back_in_the_head_of_the_output_line(tmp_path: Path) -> None:
    text, tokens = requests_of(tmp_path, '{"id": 5, "prompt": "ü"}\n{"prompt_token_ids": [0, 3], "id": "k"}')
    assert text.head(0) == {"index": 0, "id": 5, "prompt": "ü"}
    assert tokens.head(1) == {"index": 1, "id": "k", "prompt_token_ids": [0, 3]}
    assert tokens.for_engine() == {"prompt_token_ids": (0, 3)}


def test_a_text_file_is_a_prompt_a_line_spaces_kept(tmp_path: Path) -> None:
    content = '\ufeff one \r\n{"two"}\r\nthree\u2028still three\n\n\n'
    prompts = [request.prompt for request in requests_of(tmp_path, content, "in.txt")]
    assert prompts == [" one ", '{"two"}', "three\u2028still three"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "x"', "in.jsonl line 2: the line is not valid JSON: Expecting ',' delimiter at column 15"),
        ("[" * 100_000, "in.jsonl line 2: the line is not valid JSON"),
        ('{"prompt": "x", "temperature": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "x", "prompt": "y"}', "a key occurs twice"),
        ('"x"', 'in.jsonl line 2: the line is "x"; it must be an object such as {"prompt": "..."}'),
        (
            '{"prompt": "x", "max_token": 3}',
            'the key "max_token" is unknown; allowed are prompt, prompt_token_ids, id, max_',
        ),
        ('{"prompt": ""}', 'prompt is ""; it must be a string that is not empty'),
        ('{"prompt": null}', "prompt is null; it must be a string"),
        ('{"prompt": ["a"]}', 'prompt is ["a"]; it must be a string'),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"prompt": "x", "id": "\\ud800"}', "not valid Unicode"),
        ('{"id": "x"}', "exactly one of prompt and prompt_token_ids"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "exactly one of prompt and prompt_token_ids"),
        ('{"prompt_token_ids": []}', "must be a list of integers from 0, not empty"),
        ('{"prompt_token_ids": [1, true]}', "must be a list of integers from 0"),
        ('{"prompt_token_ids": [1, -1]}', "must be a list of integers from 0"),
        ('{"prompt_token_ids": [1.0]}', "must be a list of integers from 0"),
        ('{"prompt": "x", "max_tokens": "3"}', 'max_tokens is "3"; it must be an integer'),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens is true; it must be an integer"),
        ('{"prompt": "x", "max_tokens": null}', "max_tokens is null; it must be an integer"),
        ('{"prompt": "x", "max_tokens": 0}', "in.jsonl line 2: max_tokens is 0; it must be at least 1"),
        ('{"prompt": "x", "temperature": 1e999}', "temperature is inf; it must be 0 (greedy), or 1e-06 or more"),
        ('{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "line 2: "),
        ('{"prompt": "x", "top_p": 0}', "top_p is 0.0; it must be above 0"),
        ('{"prompt": "x", "stop": ["a", 1]}', "stop holds 1; it must hold strings"),
        ('{"prompt": "x", "stop": ""}', 'stop holds ""; it must hold strings that are not empty'),
        ('{"prompt": "x", "id": null}', "id is null; it must be a string or an integer"),
        ("  ", "in.jsonl line 2: the line is empty; remove it, or write a prompt"),
    ],
)
def test_a_bad_line_is_refused_by_number(tmp_path: Path, line: str, complaint: str) -> None:
    message = refusal_of(tmp_path, f'{{"prompt": "fine"}}\n{line}\n{{"prompt": "fine"}}\n')
    assert message.startswith("in.jsonl line 2: ")
    assert complaint in message


def test_a_line_that_is_not_utf8_is_refused_by_number(tmp_path: Path) -> None:
    assert refusal_of(tmp_path, b"fine\nf\xfcnf\n", "in.txt") == "in.txt line 2: the line is not UTF-8 text"


@pytest.mark.parametrize("content", ["", "\n", "\n\r\n", "  \n", "\ufeff"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str, name: str) -> None:
    assert refusal_of(tmp_path, content, name) == f"{name} holds no prompt; write one a line"


def test_a_missing_file_a_directory_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    for source, complaint in [
        (tmp_path / "none.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "in.csv", "give a .jsonl or .txt file"),
    ]:
        with pytest.raises(PromptError) as refusal:
            read_requests((), str(source), DEFAULTS)
        assert complaint in str(refusal.value)
        assert str(source) in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "source", "complaint"),
    [
        ([], None, "no prompt is given"),
        (["a", ""], None, "prompt 2 is empty"),
        (["a"], "in.jsonl", "use one of the two"),
        (["a\udcff"], None, "not valid Unicode"),
    ],
)
def test_unusable_arguments_are_refused(arguments: list[str], source: str | None, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        read_requests(arguments, source, DEFAULTS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["prompt", "prompt_token_ids", "id", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "nonsense"]
)


@given(line=json_values | st.dictionaries(keys, json_values, max_size=4))
def test_any_json_is_a_usable_request_or_a_refusal_that_names_the_line(
    tmp_path_factory: pytest.TempPathFactory, line: object
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(line))
    try:
        (request,) = read_requests((), str(file), DEFAULTS)
    except PromptError as refusal:
        assert str(refusal).startswith(f"{file} line 1: ")  # noqa: PT017 - both outcomes are right
    else:
        assert json.dumps(request.head(0), ensure_ascii=False).encode()
        assert request.prompt
