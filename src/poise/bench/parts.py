"""A long benchmark in parts: each writes what it measured when it ends, whatever happens to the others.

Parts lie below the work directory, one file each with its own stamp. A call runs all parts, or those that are asked for; the
table and the result file then also hold the others' last results, each with the date and commit of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poise.bench.machine import stamp
from poise.errors import PoiseError
from poise.spec.whole_file import write_whole


class Parts:
    """The parts of benchmark ``name``, ``order`` all there are, ``wanted`` those to run (none: all)."""

    def __init__(self, directory: Path, name: str, *, order: Sequence[str], wanted: Sequence[str]) -> None:
        self._directory = directory / "parts" / name
        self._order = tuple(order)
        self._wanted = tuple(wanted) or self._order
        self._failed: dict[str, str] = {}

    def run(self, measure: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
        """Runs the wanted parts in order; one that fails is noted, and the others run on."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for part in self._order:
            if part not in self._wanted:
                continue
            say(f"Part {part}")
            try:
                results = measure[part]()
            except PoiseError as error:
                self._failed[part] = str(error)
                say(f"  failed: {error}")
                continue
            facts = {"stamp": asdict(stamp()), "results": results}
            write_whole(self._directory / f"{part}.json", json.dumps(facts, allow_nan=False))

    def results(self) -> dict[str, dict[str, Any]]:
        """Of every part that ever ran, in order: ``date``, ``commit``, ``dirty`` and what it measured."""
        return dict(self._read())

    def raise_if_failed(self) -> None:
        """Raises PoiseError that names the parts of this call that failed."""
        if self._failed:
            failures = "; ".join(f"{part}: {reason}" for part, reason in self._failed.items())
            raise PoiseError(f"{len(self._failed)} of {len(self._wanted)} parts failed: {failures}")

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for part in self._order:
            file = self._directory / f"{part}.json"
            if file.exists() and part not in self._failed:
                found = json.loads(file.read_text())
                facts = {key: found["stamp"][key] for key in ("date", "commit", "dirty")}
                yield part, facts | found["results"]


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)
