"""From what a caller gives as prompts to token ids; anything that is none is one clear line, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from poise.engine.request import Prompt
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, UsageError

ALLOWED = 'a string or {"prompt_token_ids": [...]}'


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list. Raises UsageError for something that is neither."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        return list(prompts)
    except TypeError:
        raise UsageError(f"prompts is {_shown(prompts)}; give {ALLOWED}, or a list of these") from None


def params_for(
    prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    """Sampling parameters for each prompt. Raises UsageError when there are not as many as prompts."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * len(prompts)
    if not isinstance(given, Sequence) or not all(isinstance(each, SamplingParams) for each in given):
        raise UsageError(f"sampling_params is {_shown(given)}; give a SamplingParams, or a list with one per prompt")
    if len(given) != len(prompts):
        raise UsageError(
            f"{len(given)} sampling_params for {len(prompts)} prompts; give one for all, or one per prompt"
        )
    return given


def token_ids(
    prompt: Prompt, params: SamplingParams, *, index: int, tokenizer: Any, vocabulary: int, context_tokens: int
) -> list[int]:
    """The prompt's tokens. Raises PromptError for one that is empty, unknown to the vocabulary, too long, or no prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError("it is text and the checkpoint has no tokenizer; give prompt_token_ids", index=index)
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])  # a prompt that is too long is refused below
    else:
        ids = _given_ids(prompt, index)
    if not ids:
        raise PromptError("it is empty; give at least one token", index=index)
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise PromptError(f"it has token id {wrong}; the model's vocabulary has 0 to {vocabulary - 1}", index=index)
    if len(ids) + params.max_tokens > context_tokens:
        raise PromptError(
            f"it has {len(ids)} tokens and asks for {params.max_tokens} more; the model's context is {context_tokens}: "
            "shorten the prompt or lower max_tokens",
            index=index,
        )
    return ids


def _given_ids(prompt: object, index: int) -> list[int]:
    if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
        raise PromptError(f"it is {_shown(prompt)}; give {ALLOWED}", index=index)
    given = prompt["prompt_token_ids"]
    try:
        return [token.__index__() for token in given]
    except (TypeError, AttributeError):
        raise PromptError(f"its prompt_token_ids is {_shown(given)}; give a list of integers", index=index) from None


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
