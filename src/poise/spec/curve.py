"""What a cost curve is: the time that one kind of work takes against tokens, as measured points or in closed form.

Data and its rules only; evaluating curves is ``poise.cost``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from poise.errors import MachineError
from poise.spec.fields import Fields
from poise.spec.rules import require, require_positive

CurveKind = Literal["expert", "attention", "gate", "dense"]
KINDS: tuple[CurveKind, ...] = get_args(CurveKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is multiplied. ``intermediate``: inner size, query width (attention), experts (gate), vocabulary (dense)."""

    hidden: int
    intermediate: int
    dtype: str

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "hidden", self.hidden, "at least 1")
        require(self.intermediate >= 1, "intermediate", self.intermediate, "at least 1")
        require(bool(self.dtype), "dtype", self.dtype, "a name such as bfloat16")

    def __str__(self) -> str:
        return f"{self.hidden} x {self.intermediate} {self.dtype}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """``tokens`` rows in all take ``seconds``, spread evenly over ``active`` experts (1 where there are none)."""

    tokens: int
    active: int
    seconds: float

    def __post_init__(self) -> None:
        require(self.active >= 1, "active", self.active, "at least 1")
        require(self.tokens >= self.active, "tokens", self.tokens, f"at least the active experts, {self.active}")
        require_positive(self.seconds, "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedForm:
    """``T(n, e) = ((e a)^p + (b n)^p)^(1/p)``: ``a_s`` seconds per active expert, ``b_s`` per token."""

    a_s: float
    b_s: float
    p: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.a_s) and self.a_s >= 0, "a_s", self.a_s, "0 or more")
        require_positive(self.b_s, "b_s")
        require(0.1 <= self.p <= 100, "p", self.p, "0.1 to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Time against tokens: either ``points`` or a ``closed_form``.

    Attention also depends on ``context_tokens`` (a sequence's length behind the pass) and ``row_tokens`` (what each
    sequence brings: 1 in decode); for all other kinds both are None.
    """

    kind: CurveKind
    shape: Shape
    points: tuple[Point, ...] = ()
    closed_form: ClosedForm | None = None
    context_tokens: int | None = None
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        if bool(self.points) == (self.closed_form is not None):
            raise MachineError("a curve needs either points or a closed_form, and not both")
        if len({(point.tokens, point.active) for point in self.points}) < len(self.points):
            raise MachineError("a curve has two points for the same tokens and active experts; keep one")
        if self.kind == "attention":
            rows, context = self.row_tokens, self.context_tokens
            if rows is None or context is None or not 1 <= rows <= context:
                raise MachineError(
                    f"row_tokens {rows} and context_tokens {context} of an attention curve must be 1 <= row <= context"
                )
        elif (self.row_tokens, self.context_tokens) != (None, None):
            raise MachineError(f"a curve of kind {self.kind} has no row_tokens or context_tokens; leave them out")
        if self.kind != "expert" and any(point.active != 1 for point in self.points):
            raise MachineError(f"a curve of kind {self.kind} has no active experts; write 1")


def curve_from(fields: Fields) -> Curve:
    """A curve from its JSON object. Raises MachineError."""
    kind: Any = fields.text("kind")
    return Curve(
        kind=kind,
        shape=fields.one("shape", _shape),
        points=fields.parsed_rows("points", ("tokens", "active", "seconds"), _point) if fields.has("points") else (),
        closed_form=fields.one("closed_form", _closed_form) if fields.has("closed_form") else None,
        context_tokens=fields.whole("context_tokens") if fields.has("context_tokens") else None,
        row_tokens=fields.whole("row_tokens") if fields.has("row_tokens") else None,
    )


def _shape(fields: Fields) -> Shape:
    return Shape(hidden=fields.whole("hidden"), intermediate=fields.whole("intermediate"), dtype=fields.text("dtype"))


def _point(fields: Fields) -> Point:
    return Point(tokens=fields.whole("tokens"), active=fields.whole("active"), seconds=fields.number("seconds"))


def _closed_form(fields: Fields) -> ClosedForm:
    return ClosedForm(a_s=fields.number("a_s"), b_s=fields.number("b_s"), p=fields.number("p"))
