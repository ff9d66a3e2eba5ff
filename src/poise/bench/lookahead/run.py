"""`poise bench lookahead`: the lookahead predictor on the bundled model, trained without any loss that helps prediction.

Parts: ``choice``: width, rate and length of training; ``quality``: `poise distill` as it is, figures per layer; ``ceiling``:
what bounds recall; ``domains``: online learning through switches of domain; ``prefetch``: experts foreseen, against the
correlation table; ``engine``: the same in the engine, with the model widened; ``disk-1``, ``disk-2-large``, ``disk-1-large``:
that on slow disks, the last two with larger experts, which takes root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from poise.bench.lookahead import ceiling, choice, domains, engine, prefetch, quality, slow_disk
from poise.bench.lookahead.tables import tables
from poise.bench.offload.case import work_directory
from poise.bench.parts import Parts
from poise.bench.publish import publish

NAME = "lookahead"
PARTS = ("choice", "quality", "ceiling", "domains", "prefetch", "engine", *slow_disk.SLOW_DISKS)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """Each part takes 1 to 5 minutes; one thread. ``steps`` is of no use here."""
    torch.set_num_threads(1)
    done = Parts(work_directory(), NAME, order=PARTS, wanted=parts)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "choice": choice.measure,
        "quality": quality.measure,
        "ceiling": ceiling.measure,
        "domains": domains.measure,
        "prefetch": prefetch.measure,
        "engine": engine.measure,
        **{name: partial(slow_disk.measure, case) for name, case in slow_disk.SLOW_DISKS.items()},
    }
    done.run(measures)
    results: Mapping[str, Any] = {"model": "tiny-moe", "parts": done.results()}
    publish(NAME, results, tables, output=output, json_output=json_output)
    done.raise_if_failed()
