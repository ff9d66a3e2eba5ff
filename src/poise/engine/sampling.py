"""How the next token is chosen: greedy or sampled, and when a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass

from poise.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one request, named as in vLLM. ``temperature=0`` is greedy.

    ``seed`` makes a sampled sequence repeat, whatever else runs in its batch. ``stop`` strings end a sequence and are not
    part of its text. Raises UsageError for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _require("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "0 (greedy) or more")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or left out for all")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")
        _require("stop", self.stop, all(self.stop), "strings that are not empty")


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {allowed}")
