"""What can be wrong with the arguments of ``generate``: one line says what and where, and the LLM can be used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise import LLM, SamplingParams
from poise.errors import PromptError, UsageError
from tests.conftest import MakeCheckpoint


@pytest.fixture(scope="module")
def root(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("qwen3_moe")


@pytest.mark.parametrize(
    ("ids", "max_tokens", "pattern"),
    [
        ([], 1, "it is empty"),
        ([5, 128], 1, "token id 128; the model's vocabulary has 0 to 127"),
        ([5, -1], 1, "token id -1"),
        ([5] * 257, 1, "257 tokens and asks for 1 more; the model's context is 256"),
        ([5] * 200, 57, "200 tokens and asks for 57 more; the model's context is 256"),
    ],
    ids=["empty", "id too large", "negative id", "prompt too long", "answer too long"],
)
def test_a_prompt_that_cannot_run_is_refused_by_its_place_and_the_others_can_go_on(
    ids: list[int], max_tokens: int, pattern: str, root: Path
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    with LLM(root, memory="1GiB") as llm:
        with pytest.raises(PromptError, match=f"prompt 1: .*{pattern}"):
            llm.generate([{"prompt_token_ids": [5]}, {"prompt_token_ids": ids}], params)
        assert len(llm.generate({"prompt_token_ids": [5] * 199}, params)) == 1


@pytest.mark.parametrize(
    ("prompts", "pattern"),
    [
        ([[1, 2]], r"prompt 0: it is \[1, 2\]; give a string or"),
        ({"x": 1}, r"prompt 0: it is \{'x': 1\}; give a string or"),
        ([{"prompt_token_ids": [5], "more": 1}], r"prompt 0: it is \{.*'more'.*\}; give a string or"),
        ([{"prompt_token_ids": 5}], r"prompt 0: its prompt_token_ids is 5; give a list of integers"),
        ([{"prompt_token_ids": [5]}, {"prompt_token_ids": [5, "6"]}], r"prompt 1: its prompt_token_ids is \[5, '6'\]"),
        ([{"prompt_token_ids": [1.5]}], r"prompt 0: its prompt_token_ids is \[1\.5\]"),
        ([None], r"prompt 0: it is None; give a string or"),
        (7, r"prompts is 7; give a string or"),
        (None, r"prompts is None; give a string or"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(prompts: Any, pattern: str, root: Path) -> None:
    with LLM(root, memory="1GiB") as llm, pytest.raises(UsageError, match=pattern) as refusal:
        llm.generate(prompts)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ids", [(5, 6), torch.tensor([5, 6]), np.array([5, 6])], ids=["tuple", "tensor", "array"])
def test_token_ids_may_come_in_any_sequence(ids: Any, root: Path) -> None:
    with LLM(root, memory="1GiB") as llm:
        (result,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1))
    assert result.prompt_token_ids == (5, 6)


def test_text_without_a_tokenizer_is_refused_with_the_remedy(root: Path) -> None:
    with LLM(root, memory="1GiB") as llm, pytest.raises(PromptError, match="no tokenizer; give prompt_token_ids"):
        llm.generate("def main():")


@pytest.mark.parametrize("given", [{"max_tokens": 3}, 5, ["x"], [None], "x"])
def test_what_are_no_sampling_parameters_is_refused_in_one_line(given: Any, root: Path) -> None:
    with (
        LLM(root, memory="1GiB") as llm,
        pytest.raises(UsageError, match=r"sampling_params is .*; give a SamplingParams"),
    ):
        llm.generate({"prompt_token_ids": [5]}, given)
