"""Prompts as users give them: arguments, a JSONL file, a text file with a prompt a line, or JSONL on standard input.

Contract: what comes out is never empty, and every request carries its complete sampling parameters: those of the
command line, overridden by those of its line. A problem is a PromptError that names the file and the line. Blank lines
at the end of a file are ignored; elsewhere they are an error, so that line numbers and results stay together.
Not here: tokenizing, and checking token ids against a vocabulary (the engine does both).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from poise.engine.request import Prompt
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, UsageError

STDIN = "-"

# What a line may override, the JSON types it may have, and how an error describes them. bool is never an integer here.
_OVERRIDES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "max_tokens": ((int,), "an integer"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "top_k": ((int, type(None)), "an integer or null"),
    "seed": ((int, type(None)), "an integer or null"),
    "stop": ((str, list), "a string or a list of strings"),
}
_ALLOWED_KEYS = ("prompt", "prompt_token_ids", "id", *_OVERRIDES)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRequest:
    """One prompt, text or token ids, and how to continue it. ``id`` is the user's own name for it, or None."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    id: str | int | None = None

    def for_engine(self) -> Prompt:
        """The prompt as ``LLM.generate`` takes it."""
        return self.prompt if isinstance(self.prompt, str) else {"prompt_token_ids": self.prompt}

    def head(self, index: int) -> dict[str, object]:
        """The part of the output line that is known before the run: index, id if there is one, prompt."""
        named = {} if self.id is None else {"id": self.id}
        if isinstance(self.prompt, str):
            return {"index": index, **named, "prompt": self.prompt}
        return {"index": index, **named, "prompt_token_ids": list(self.prompt)}


def read_requests(arguments: Sequence[str], source: str | None, defaults: SamplingParams) -> list[PromptRequest]:
    """The requests of a command line: its positional prompts, or those of the file `source` (``-``: standard input)."""
    if arguments and source is not None:
        raise PromptError("prompts are given both as arguments and with --prompts; use one of the two")
    if source is None:
        if not arguments:
            raise PromptError("no prompt is given; write one as an argument, or name a file with --prompts")
        return [_from_argument(number, text, defaults) for number, text in enumerate(arguments, start=1)]
    parse, name = _parser_of(source)
    lines = _lines_of(_read(source, name), name)
    return [_at_line(source, number, parse, line, defaults) for number, line in enumerate(lines, start=1)]


def place_of(source: str, number: int) -> str:
    """How errors name line `number` (from 1) of the prompt file `source`."""
    return f"{'standard input' if source == STDIN else source} line {number}"


def _from_argument(number: int, text: str, defaults: SamplingParams) -> PromptRequest:
    if not text:
        raise PromptError(f"prompt {number} is empty; write at least one character")
    return PromptRequest(prompt=_encodable("prompt", text), sampling=defaults)


def _parser_of(source: str) -> tuple[Callable[[str, SamplingParams], PromptRequest], str]:
    if source == STDIN:
        return _parse_json_line, "standard input"
    suffix = Path(source).suffix.lower()
    if suffix == ".txt":
        return _parse_text_line, source
    if suffix in ("", ".jsonl", ".ndjson"):  # none: a pipe such as /dev/fd/63
        return _parse_json_line, source
    raise PromptError(
        f"prompt file {source!r} is of an unknown kind; give a .jsonl or .txt file, or - for JSONL on stdin"
    )


def _read(source: str, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    except OSError as error:
        raise PromptError(f"prompt file {name!r} cannot be read: {error.strerror or error}") from None


def _lines_of(content: bytes, name: str) -> list[bytes]:
    content = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if not content.strip():
        raise PromptError(f"{name} holds no prompt; write one a line")
    return [line.removesuffix(b"\r") for line in content.split(b"\n")]


def _at_line(
    source: str,
    number: int,
    parse: Callable[[str, SamplingParams], PromptRequest],
    line: bytes,
    defaults: SamplingParams,
) -> PromptRequest:
    """Parses one line; whatever is wrong with it becomes one PromptError that says where."""
    try:
        text = line.decode("utf-8")
        if not text.strip():
            raise PromptError("the line is empty; remove it, or write a prompt")
        return parse(text, defaults)
    except UnicodeDecodeError:
        raise PromptError(f"{place_of(source, number)}: the line is not UTF-8 text") from None
    except (UsageError, OverflowError) as error:
        raise PromptError(f"{place_of(source, number)}: {error}") from None


def _parse_text_line(text: str, defaults: SamplingParams) -> PromptRequest:
    return PromptRequest(prompt=text, sampling=defaults)


def _parse_json_line(text: str, defaults: SamplingParams) -> PromptRequest:
    try:
        fields = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise PromptError(f"the line is not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the line is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise PromptError(f'the line is {_shown(fields)}; it must be an object such as {{"prompt": "..."}}')
    unknown = [key for key in fields if key not in _ALLOWED_KEYS]
    if unknown:
        raise PromptError(f"the key {_shown(unknown[0])} is unknown; allowed are {', '.join(_ALLOWED_KEYS)}")
    if ("prompt" in fields) == ("prompt_token_ids" in fields):
        raise PromptError("the line must have exactly one of prompt and prompt_token_ids")
    prompt = _text_of(fields["prompt"]) if "prompt" in fields else _token_ids_of(fields["prompt_token_ids"])
    return PromptRequest(prompt=prompt, sampling=_sampling_of(fields, defaults), id=_id_of(fields))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _text_of(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise PromptError(f"prompt is {_shown(value)}; it must be a string that is not empty")
    return _encodable("prompt", value)


def _token_ids_of(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise PromptError(f"prompt_token_ids is {_shown(value)}; it must be a list of integers from 0, not empty")
    return tuple(value)


def _id_of(fields: Mapping[str, object]) -> str | int | None:
    value = fields.get("id")
    if value is None and "id" not in fields:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PromptError(f"id is {_shown(value)}; it must be a string or an integer")
    return _encodable("id", value) if isinstance(value, str) else value


def _sampling_of(fields: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for name, (types, allowed) in _OVERRIDES.items():
        if name not in fields:
            continue
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, types):
            raise PromptError(f"{name} is {_shown(value)}; it must be {allowed}")
        changes[name] = float(value) if isinstance(value, int) and float in types else value
    if "stop" in changes:
        changes["stop"] = _stop_strings_of(changes["stop"])
    return replace(defaults, **changes)


def _stop_strings_of(value: str | list[object]) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    for string in strings:
        if not isinstance(string, str) or not string:
            raise PromptError(f"stop holds {_shown(string)}; it must hold strings that are not empty")
        _encodable("stop", string)
    return tuple(str(string) for string in strings)


def _encodable(name: str, text: str) -> str:
    """`text`, unless it holds half of a surrogate pair: such a string cannot be tokenized or written to a file."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError(f"{name} {_shown(text)} holds a character that is not valid Unicode") from None
    return text


def _shown(value: object) -> str:
    """`value` as JSON, cut to the length of an error line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
