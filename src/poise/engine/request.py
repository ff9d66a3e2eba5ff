"""What a caller gives and gets back: prompts, completions, progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from poise.predict.hits import Hits

Prompt = str | Mapping[str, Sequence[int]]
"""A string, or ``{"prompt_token_ids": [...]}``."""

QUANTIZATIONS = ("none", "int4")
"""What the experts can be rounded to: nothing, or 4 bits (decision 007)."""

UNKNOWN_REQUESTS, UNKNOWN_PROMPT_TOKENS = 32, 64
"""So many requests of so many tokens are planned for where nobody says what will be asked."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One generated text. ``finish_reason``: "stop" for end-of-sequence or a stop string, "length" for the token limit."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """The result for the prompt at ``index`` of the input. ``prompt`` is None when token ids were given."""

    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a call of ``generate`` stands. A hit is an expert that was in memory when its layer asked for it.

    ``prefill_ahead``, ``decode_ahead``: how good the choice of experts read ahead was, in passes with prompt tokens, in others.
    """

    finished: int
    total: int
    prompt_tokens: int
    generated_tokens: int
    bytes_read: int
    expert_hits: int
    expert_misses: int
    elapsed_s: float
    prefill_ahead: Hits = field(default_factory=Hits)
    decode_ahead: Hits = field(default_factory=Hits)

    @property
    def generated_tokens_per_s(self) -> float:
        """Generated tokens over the whole time so far, prefill included."""
        return self.generated_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def hit_frac(self) -> float:
        """Share of expert uses that needed no read (0-1)."""
        uses = self.expert_hits + self.expert_misses
        return self.expert_hits / uses if uses else 0.0
