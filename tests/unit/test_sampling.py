"""Sampling parameters: what may be written, and that anything else is one line with the value and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from poise import SamplingParams
from poise.engine.batch import Row
from poise.engine.choose import choose_token, make_generator
from poise.errors import UsageError


@pytest.mark.parametrize(
    ("stop", "kept"),
    [("self", ("self",)), (None, ()), (["a", "bc"], ("a", "bc")), (("a",), ("a",)), ([], ()), ((), ())],
)
def test_stop_strings_may_be_written_in_every_usual_way(stop: Any, kept: tuple[str, ...]) -> None:
    params = SamplingParams(stop=stop)
    assert params.stop_strings == kept
    assert params == SamplingParams(stop=kept)
    assert hash(params) == hash(SamplingParams(stop=kept))


def test_whole_numbers_stand_for_numbers_and_numpy_s_for_python_s() -> None:
    params = SamplingParams(temperature=2, top_p=1, max_tokens=np.int64(5), top_k=np.int32(3))  # type: ignore[arg-type]
    assert params == SamplingParams(temperature=2.0, top_p=1.0, max_tokens=5, top_k=3)
    assert {type(params.max_tokens), type(params.top_k)} == {int}
    generator = make_generator(params)
    assert 0 <= choose_token(torch.zeros(8), params, generator) < 8


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be an integer"),
        ({"max_tokens": True}, "max_tokens is True; it must be an integer"),
        ({"max_tokens": "3"}, "max_tokens is '3'; it must be an integer"),
        ({"max_tokens": None}, "max_tokens is None; it must be an integer"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": False}, "temperature is False; it must be a number"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0 (greedy), or 1e-06 or more"),
        ({"temperature": 1e-45}, "temperature is 1e-45; it must be 0 (greedy), or 1e-06 or more"),
        ({"temperature": 10**400}, "temperature is inf; it must be 0 (greedy), or 1e-06 or more"),
        ({"top_p": [0.5]}, "top_p is [0.5]; it must be a number"),
        ({"top_p": float("nan")}, "top_p is nan; it must be above 0 and at most 1"),
        ({"top_k": 1.0}, "top_k is 1.0; it must be an integer, or left out"),
        ({"top_k": -1}, "top_k is -1; it must be at least 1, or left out for all"),
        ({"seed": "7"}, "seed is '7'; it must be an integer, or left out"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 2**63 - 1"),
        ({"stop": ""}, "stop is ''; it must be a string or a list of strings that are not empty"),
        ({"stop": ["a", ""]}, "stop is ['a', '']; it must be a string or a list of strings that are not empty"),
        ({"stop": ["a", 1]}, "stop is ['a', 1]; it must be a string or a list of strings that are not empty"),
        ({"stop": 5}, "stop is 5; it must be a string or a list of strings that are not empty"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}; it must be a string or a list of strings that are not empty"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
    ],
    ids=str,
)
def test_anything_else_is_refused_with_the_value_and_what_is_allowed(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as refusal:
        SamplingParams(**values)
    assert str(refusal.value) == line


def test_the_smallest_temperature_chooses_among_the_largest_logits_that_there_are() -> None:
    params = SamplingParams(temperature=1e-6, seed=0)
    logits_V = torch.tensor([-1e30, 65504.0, 1e30, 0.0])
    assert {choose_token(logits_V, params, make_generator(params)) for _ in range(20)} == {2}


def test_a_row_ends_at_its_limit_even_if_it_is_past_it() -> None:
    row = Row(0, [5], SamplingParams(max_tokens=2, ignore_eos=True), None)
    row.token_ids += [1, 1, 1]
    row.advance(torch.zeros(8), frozenset())
    assert row.finish_reason == "length"
