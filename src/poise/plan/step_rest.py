"""Whether balancing each step pays at all: where it costs more than it brings it rests, and is tried again now and then.

A layer for which no replica pays still costs its prediction, its counts and its plan. Passes of like numbers of tokens are
judged together, as balancing may pay in prefill and not in decode. Numbers in, yes or no out: no clock, the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RestRule:
    """``trial_passes`` are judged together. Balancing goes on while they save at least ``margin`` times what they take; else it
    rests for ``rest_passes``, twice as many each time in a row, up to ``most_rest_passes`` (decision 056)."""

    trial_passes: int = 8
    rest_passes: int = 32
    most_rest_passes: int = 512
    margin: float = 1.25

    def __post_init__(self) -> None:
        assert self.trial_passes > 0, "somewhat is judged"
        assert 0 < self.rest_passes <= self.most_rest_passes, "a rest has an end"


@dataclass(slots=True)
class _Kind:
    """Passes of like numbers of tokens. ``left``: passes until the rest ends; ``next_rest``: passes of the next one."""

    next_rest: int
    left: int = 0
    judged: int = 0
    saved_s: float = 0.0
    spent_s: float = 0.0


class StepRest:
    """``begin`` before each pass, ``saw`` behind it."""

    def __init__(self, rule: RestRule) -> None:
        self._rule = rule
        self._kinds: dict[int, _Kind] = {}
        self._now: _Kind | None = None
        """Of the pass at hand, where it is balanced."""

    def begin(self, tokens: int) -> bool:
        """Whether a pass over so many tokens, of all ranks, is balanced."""
        kind = self._kinds.setdefault(tokens.bit_length() // 2, _Kind(next_rest=self._rule.rest_passes))
        if kind.left:
            kind.left -= 1
            self._now = None
        else:
            self._now = kind
        return self._now is not None

    def saw(self, saved_s: float | None, spent_s: float) -> None:
        """What that pass saved, by the costs of its true tokens, and what balancing it took. ``saved_s``: None: costs are not
        known yet, so nothing could be planned. No matter where the pass was not balanced.
        """
        kind, rule = self._now, self._rule
        self._now = None
        if kind is None or saved_s is None:
            return
        kind.judged += 1
        kind.saved_s += saved_s
        kind.spent_s += spent_s
        if kind.judged < rule.trial_passes:
            return
        if kind.saved_s < rule.margin * kind.spent_s:
            kind.left, kind.next_rest = kind.next_rest, min(2 * kind.next_rest, rule.most_rest_passes)
        else:
            kind.next_rest = rule.rest_passes
        kind.judged, kind.saved_s, kind.spent_s = 0, 0.0, 0.0
