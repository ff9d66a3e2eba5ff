"""Strict reading of our own JSON formats: what is missing, of the wrong kind, or unknown is refused with its place.

Rules about values belong to the dataclasses; here only the JSON's form is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from poise.errors import UsageError

T = TypeVar("T")


class Fields:
    """One JSON object, taken field by field. ``where`` is its place in the file, for messages; ``error`` what is raised."""

    def __init__(self, value: object, where: str, error: type[UsageError]) -> None:
        self.where = where
        self._error = error
        if not isinstance(value, dict):
            raise error(f"{where} is {_kind(value)}, not an object; write the file anew")
        self._left: dict[str, object] = dict(value)

    def has(self, name: str) -> bool:
        """Whether an optional field is there and not null."""
        if self._left.get(name, ...) is None:
            del self._left[name]
        return name in self._left

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def number(self, name: str) -> float:
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def whole(self, name: str) -> int:
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self._list(name)
        if any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise self._wrong(name, value, "a list of whole numbers")
        return tuple(item for item in value if isinstance(item, int))

    def one(self, name: str, parse: Callable[[Fields], T]) -> T:
        """An object."""
        return self._parsed(self._take(name), f"{self.where}.{name}", parse)

    def many(self, name: str, parse: Callable[[Fields], T]) -> tuple[T, ...]:
        """A list of objects."""
        return tuple(self._parsed(item, f"{self.where}.{name}[{i}]", parse) for i, item in enumerate(self._list(name)))

    def rows(self, name: str, columns: tuple[str, ...]) -> tuple[Mapping[str, object], ...]:
        """A list of lists, each with a value for every column."""
        rows = []
        for place, row in enumerate(self._list(name)):
            if not isinstance(row, list) or len(row) != len(columns):
                raise self._wrong(f"{name}[{place}]", row, f"a list of {len(columns)}: {', '.join(columns)}")
            rows.append(dict(zip(columns, row, strict=True)))
        return tuple(rows)

    def parsed_rows(self, name: str, columns: tuple[str, ...], parse: Callable[[Fields], T]) -> tuple[T, ...]:
        """A list of lists, each read as an object of these columns."""
        rows = enumerate(self.rows(name, columns))
        return tuple(self._parsed(row, f"{self.where}.{name}[{place}]", parse) for place, row in rows)

    def end(self) -> None:
        """Refuses what nobody took."""
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise self._error(
                f"{self.where} has unknown fields: {unknown}; take them out, or use a newer version of Poise"
            )

    def _parsed(self, value: object, where: str, parse: Callable[[Fields], T]) -> T:
        fields = Fields(value, where, self._error)
        try:
            made = parse(fields)
        except self._error as error:
            if str(error).startswith(where):
                raise
            raise self._error(f"{where}: {error}") from None
        fields.end()
        return made

    def _list(self, name: str) -> list[object]:
        value = self._take(name)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def _take(self, name: str) -> object:
        if name not in self._left:
            raise self._error(f"{self.where} has no field {name!r}; add it, or write the file anew")
        return self._left.pop(name)

    def _wrong(self, name: str, value: object, wanted: str) -> UsageError:
        return self._error(f"{self.where}.{name} is {_kind(value)}; it must be {wanted}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return repr(value)[:60]
