"""How the next token is chosen: greedy or sampled, and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from poise.errors import UsageError

LEAST_TEMPERATURE = 1e-6
"""Logits over anything smaller may be too large for fp32; the choice is greedy long before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one request, named as in vLLM. ``temperature=0`` is greedy.

    ``seed`` makes a sampled sequence repeat, whatever else runs in its batch. ``stop``, a string or several, ends a
    sequence and is not part of its text. Raises UsageError for a value of another type or out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            object.__setattr__(self, name, _integer(name, getattr(self, name), is_optional=name != "max_tokens"))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        _require("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "True or False")
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        fits = self.temperature == 0.0 or LEAST_TEMPERATURE <= self.temperature < float("inf")
        _require("temperature", self.temperature, fits, f"0 (greedy), or {LEAST_TEMPERATURE:g} or more")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or left out for all")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as it is kept: always a tuple."""
        assert isinstance(self.stop, tuple), "stop was made a tuple"
        return self.stop


def _integer(name: str, value: object, *, is_optional: bool) -> int | None:
    if value is None and is_optional:
        return None
    holds = isinstance(value, Integral) and not isinstance(value, bool)
    _require(name, value, holds, "an integer, or left out" if is_optional else "an integer")
    return int(value)  # type: ignore[call-overload, no-any-return]  # Integral, as just required


def _number(name: str, value: object) -> float:
    holds = isinstance(value, Real) and not isinstance(value, bool)
    _require(name, value, holds, "a number")
    try:
        return float(value)  # type: ignore[arg-type]  # Real, as just required
    except OverflowError:
        return float("inf")


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    holds = isinstance(strings, (tuple, list)) and all(isinstance(each, str) and each for each in strings)
    _require(name, value, holds, "a string or a list of strings that are not empty")
    return tuple(strings)  # type: ignore[arg-type]  # of strings, as just required


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        text = " ".join(repr(value).split())
        raise UsageError(f"{name} is {text if len(text) <= 60 else f'{text[:57]}...'}; it must be {allowed}")
