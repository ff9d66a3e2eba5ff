"""Ranks in a cluster in a box that stay, and run one job after another: importing torch takes longer than most jobs.

Harness and ranks talk through files below a directory of their own. A job begins when all ranks have loaded its model; until
then they may use more of the processor than their quotas allow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from poise.bench.cluster.cluster import Cluster
from poise.bench.cluster.layout import ClusterLayout
from poise.bench.scratch import Scratch
from poise.errors import PoiseError
from poise.spec.whole_file import write_whole

_POLL_S = 0.02
_LOADING_CORES = 1.0
WITHIN_S = 220.0
"""A job that takes longer has failed, unless ``Session.within_s`` says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """``facts``: what rank 0 says. ``records_RPLN``: of every rank, pass and layer: pairs, active experts, seconds; where asked
    for. ``load_RPLE``: choices of each rank's own tokens by pass, layer and expert."""

    facts: dict[str, Any]
    records_RPLN: npt.NDArray[np.float64] | None
    load_RPLE: npt.NDArray[np.float64] | None

    @property
    def load_PLE(self) -> npt.NDArray[np.float64] | None:
        """Of all ranks together."""
        return None if self.load_RPLE is None else self.load_RPLE.sum(axis=0)

    @property
    def step_s_P(self) -> npt.NDArray[np.float64]:
        """Wall time of every pass, what lies between passes included, on rank 0."""
        return np.diff(np.asarray(self.facts["stamps_ns"], dtype=float)) / 1e9

    def passes_until(self, tokens: int) -> int:
        """After how many passes so many tokens, of all sequences, have been generated."""
        return int(np.searchsorted(self.facts["generated"], tokens))


class Session:
    """``with Session(layout) as session: session.run(job)``.

    ``within_s``: for the ranks to load a job, and for them to run it. Raises PoiseError where a limit that is needed cannot be
    set, or when a rank fails.
    """

    def __init__(self, layout: ClusterLayout) -> None:
        self.layout = layout
        self.within_s = WITHIN_S
        self._scratch = Scratch()
        self._directory = self._scratch.path
        self._cluster = Cluster(layout)
        self._jobs = 0
        self._has_failed = False
        self._has_quotas = any(limits.cores is not None for limits in layout.ranks)

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        if self._cluster.missing:
            self._close(None, None, None)
            needs = "root for its limits" if self._has_quotas or self.layout.link_bytes_per_s else "more cores"
            raise PoiseError(f"{self.layout.name}: this part needs {needs}; {'; '.join(self._cluster.missing)}")
        self._cluster.start([sys.executable, "-m", "poise.bench.parallel.worker", str(self._directory)])
        self._unlimited()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._has_failed:
                self._put("job", {"end": True})
                self._cluster.wait(20.0)
        finally:
            self._close(kind, error, traceback)

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._cluster.__exit__(kind, error, traceback)
        finally:
            self._scratch.close()

    @property
    def enforced(self) -> tuple[str, ...]:
        """The limits that hold."""
        return self._cluster.enforced

    @property
    def missing(self) -> tuple[str, ...]:
        """What the layout wants and the kernel does not."""
        return self._cluster.missing

    def run(
        self, job: Mapping[str, Any], *, on_wait: Callable[[int, Callable[[int, float], None]], None] | None = None
    ) -> JobResult:
        """Runs a job (``worker``) on all ranks. ``on_wait`` is called again and again with the number of passes done and a
        function that changes a rank's share of the processor."""
        ranks = range(len(self.layout.ranks))
        port = None if self.layout.link_bytes_per_s else self._cluster.free_port()
        self._put("job", {"port": port, "copy_engines": self.layout.copy_engines, **job})
        loaded = [self._file(f"loaded-{rank}") for rank in ranks]
        self._await(loaded)
        self._limited()
        if self.layout.copy_engines:
            for rank, file in enumerate(loaded):
                for thread in json.loads(file.read_text())["copies"]:
                    self._cluster.let_out(rank, thread)
        self._put("go", {})
        done = [self._file(f"done-{rank}") for rank in ranks]
        self._await(done, None if on_wait is None else lambda: on_wait(self._passes(), self._cluster.set_cores))
        facts = [json.loads(file.read_text()) for file in done]
        arrays = [np.load(file) for rank in ranks if (file := self._file(f"records-{rank}", "npz")).exists()]
        self._jobs += 1
        self._unlimited()
        return JobResult(
            facts=facts[0],
            records_RPLN=np.stack([each["records"] for each in arrays]) if arrays else None,
            load_RPLE=np.stack([each["load"] for each in arrays]).astype(float) if arrays else None,
        )

    def _unlimited(self) -> None:
        if self._has_quotas:
            for rank in range(len(self.layout.ranks)):
                self._cluster.set_cores(rank, _LOADING_CORES)

    def _limited(self) -> None:
        for rank, limits in enumerate(self.layout.ranks):
            if limits.cores is not None:
                self._cluster.set_cores(rank, limits.cores)

    def _file(self, name: str, kind: str = "json") -> Path:
        return self._directory / f"{name}-{self._jobs}.{kind}"

    def _put(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self._file(name), json.dumps(content))

    def _passes(self) -> int:
        file = self._file("passes")
        return int(file.read_text() or 0) if file.exists() else 0

    def _await(self, files: list[Path], between: Callable[[], None] | None = None) -> None:
        deadline = time.monotonic() + self.within_s
        while not all(file.exists() for file in files):
            ended = self._cluster.ended()
            if ended or time.monotonic() > deadline:
                self._has_failed = True
                result = self._cluster.wait(5.0 if ended else 0.0)
                said = next((rank.stderr.strip()[-400:] for rank in result.ranks if rank.returncode > 0), "")
                why = f"rank {ended[0]} failed" if ended else f"not done within {self.within_s:.0f} s"
                raise PoiseError(f"{self.layout.name}: {why} {said}")
            if between is not None:
                between()
            time.sleep(_POLL_S)
