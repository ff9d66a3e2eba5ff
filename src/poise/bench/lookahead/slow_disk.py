"""What reading ahead by a lookahead is worth where a miss costs time: part ``engine`` on disks that the kernel makes slow.

The correlation table, lookaheads mixed with it, and one instead of it. All run in one process, whose disk reads and memory are
limited; its reads go past the page cache. As a program (``python -m poise.bench.lookahead.slow_disk JOB``) it is that process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from poise.bench.disk import require_disk
from poise.bench.limits import Limits, forget_cached
from poise.bench.lookahead.engine import SEQUENCES, measured, prepared, prompts_of
from poise.bench.prefetch_engine import FACTOR, SLOTS
from poise.engine.lookahead_use import LookaheadUse
from poise.errors import PoiseError
from poise.units import GIB

MEMORY_BYTES = 5 * GIB
"""Of the process with its four engines, page cache included."""
MODEL_BYTES = 3 * GIB
"""More than a widened model takes on the disk."""
ROUNDS = 2
TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowDisk:
    """A disk, and what runs from it: the bundled model widened ``factor`` times, ``sequences`` at once."""

    read_bytes_per_s: int
    factor: int = FACTOR
    sequences: tuple[int, ...] = SEQUENCES


SLOW_DISKS = {
    "disk-1": SlowDisk(read_bytes_per_s=1_000_000_000),
    "disk-2-large": SlowDisk(read_bytes_per_s=2_000_000_000, factor=4 * FACTOR, sequences=(1,)),
    "disk-1-large": SlowDisk(read_bytes_per_s=1_000_000_000, factor=4 * FACTOR, sequences=(1,)),
}
"""By the name of the part. Large experts: what a lookahead takes is less of a pass, and a miss costs four times as much."""


def measure(case: SlowDisk) -> dict[str, Any]:
    """As part ``engine``, with what was enforced. Raises PoiseError where the disk cannot be limited."""
    with tempfile.TemporaryDirectory(prefix="poise-lookahead-") as scratch:
        require_disk(Path(scratch), MODEL_BYTES)
        model, file = prepared(Path(scratch), case.factor)
        forget_cached(model)
        with Limits(memory_bytes=MEMORY_BYTES, read_bytes_per_s=case.read_bytes_per_s, path=model) as limits:
            if limits.missing:
                raise PoiseError(f"not enforced: {'; '.join(limits.missing)}")
            job = json.dumps({"model": str(model), "file": str(file), "sequences": case.sequences})
            child = limits.run(
                [sys.executable, "-m", "poise.bench.lookahead.slow_disk", job],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                timeout_s=TIMEOUT_S,
            )
            if child.returncode != 0:
                raise PoiseError(f"the run ended with {child.returncode}: {child.stderr[-500:]}")
            found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
            return {
                "read_bytes_per_s": case.read_bytes_per_s,
                "limits_enforced": list(limits.enforced),
                "peak_bytes": child.peak_bytes,
                "rounds": ROUNDS,
                "factor": case.factor,
                "slots": SLOTS,
                **found,
            }


def main() -> None:
    """Runs the job, prints one JSON line."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    model, file = Path(job["model"]), Path(job["file"])
    uses = {
        "table": None,
        "frozen, mixed": LookaheadUse(prefetches=True, mixes=True),
        "distilled, mixed": LookaheadUse(file=file, prefetches=True, mixes=True),
        "distilled, instead": LookaheadUse(file=file, prefetches=True),
    }
    outcomes = [each for rows in job["sequences"] for each in measured(model, uses, prompts_of(rows), rounds=ROUNDS)]
    print(json.dumps({"outcomes": [asdict(one) for one in outcomes]}))


if __name__ == "__main__":
    main()
