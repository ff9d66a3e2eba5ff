"""Dated result files of the benchmarks: ``YYYY-MM-DD-NAME.json``, written whole or not at all.

A second run on the same day gets a counter (``YYYY-MM-DD-NAME-2.json``) unless it asks to overwrite: results are kept,
the bad ones included. A file holds ``version``, ``name``, ``stamp`` (see ``machine.py``) and ``results``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path

from poise.bench.machine import Stamp
from poise.errors import UsageError

VERSION = 1


def document(name: str, stamp: Stamp, results: Mapping[str, object]) -> dict[str, object]:
    """What a result file holds, and what ``--json`` prints."""
    return {"version": VERSION, "name": name, "stamp": asdict(stamp), "results": dict(results)}


def write_result(
    directory: Path,
    name: str,
    stamp: Stamp,
    results: Mapping[str, object],
    *,
    today: date,
    overwrite: bool = False,
) -> Path:
    """Write one result file below ``directory``, which is made if need be; returns its path.

    Raises UsageError if the directory cannot be written.
    """
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), f"a result's name is lower case with dashes, not {name!r}"
    text = json.dumps(document(name, stamp, results), indent=2, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _publish(text, directory, f"{today.isoformat()}-{name}", overwrite)
    except OSError as error:
        raise UsageError(f"cannot write results to {directory} ({error.strerror}); give another --output") from error


def _publish(text: str, directory: Path, stem: str, overwrite: bool) -> Path:
    descriptor, scratch = tempfile.mkstemp(prefix=f".{stem}-", suffix=".json", dir=directory)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        if overwrite:
            target = directory / f"{stem}.json"
            os.replace(scratch, target)
            return target
        return _link_free_name(scratch, directory, stem)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _link_free_name(scratch: str, directory: Path, stem: str) -> Path:
    """A link fails where the name is taken, also by a run that finished a moment ago."""
    for number in itertools.count(1):
        target = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            os.link(scratch, target)
        except FileExistsError:
            continue
        return target
    raise AssertionError("unreachable: the count does not end")
