"""One rank of a benchmark session: takes jobs from a directory, one after another, until one says ``end``.

A job: ``model``, ``memory``, ``dtype``, ``balance`` (or ``reference``: one process, no ranks), ``groups`` ([[batch size,
batches]]), ``prompts`` (JSON file of token ids, in the order of passes), ``new_tokens`` (of each prompt: a number, or a list);
optional ``policy`` (fields other than as they are), ``placement`` (as its file has it), ``redundant_slots``,
``keeps_records`` (every layer of every pass, into a file), ``steps`` (as ``policy``, where each step is balanced: every one,
unless it ``rests``), ``tells_passes`` (how many are done, in a file), ``has_figures`` (False: no layer is taken down),
``device`` (left out: a GPU where there is one), ``temperature`` (left out: greedy; each sequence samples by its own seed).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from poise.engine.balances import BALANCES
from poise.engine.llm import LLM
from poise.engine.parallel_llm import ParallelLLM
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.sampling import SamplingParams
from poise.parallel.launch import Launch
from poise.parallel.moe_layer import LayerRecord
from poise.spec.placement import Placement
from poise.spec.whole_file import write_whole

_POLL_S = 0.01
ASIDE_THREADS = ("poise-replicas", "poise-migration", "poise-ahead")
"""That run beside the shares, where a layout says so: as copy engines do, and as a thread on a core to spare does."""
PATHS = ("lookahead", "replay")


def main() -> None:
    """Runs jobs."""
    directory = Path(sys.argv[1])
    launch = Launch.from_environment(os.environ)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for number in range(sys.maxsize):
        job = json.loads(_await(directory / f"job-{number}.json"))
        if job.get("end"):
            return
        port = job.get("port") or launch.port + 1 + number  # a network of one's own has all ports free
        here = replace(launch, port=port, attempt=number)  # a store of its own
        facts = _Rank(directory, number, here, job).run()
        write_whole(directory / f"done-{launch.rank}-{number}.json", json.dumps(facts))


class _Rank:
    """One job on this rank."""

    def __init__(self, directory: Path, number: int, launch: Launch, job: Mapping[str, Any]) -> None:
        self._directory, self._number, self._launch, self._job = directory, number, launch, job
        self._stamps_ns: list[int] = []
        self._generated: list[int] = []
        self._rows: list[tuple[int, int, float]] = []
        self._load: list[Any] = []

    def run(self) -> dict[str, Any]:
        job = self._job
        if job["balance"] == "reference":
            return self._run_alone()
        facts: dict[str, Any] = {}
        with self._open() as llm:
            if job.get("keeps_records"):
                self._listen(llm)
            self._loaded(copies=[one.native_id for one in threading.enumerate() if one.name.startswith(ASIDE_THREADS)])
            if self._launch.rank > 0:
                llm.follow()
            else:
                made = llm.generate(*self._asked(), on_progress=self._stamp)
                facts = self._facts(llm, made)
            if job.get("keeps_records"):
                self._save_records(len(llm.placement.layers))
        return facts

    def _run_alone(self) -> dict[str, Any]:
        """One process with all experts, as anyone runs it."""
        with LLM(self._job["model"], memory=self._job["memory"], dtype=self._job["dtype"]) as llm:
            self._loaded()
            return {"tokens": _tokens(llm.generate(*self._asked()))}

    def _open(self) -> ParallelLLM:
        job = self._job
        named = BALANCES[job["balance"]]
        policy, steps = named.policy, named.steps
        if policy is not None:
            policy = replace(policy, **job.get("policy", {}))  # type: ignore[type-var]
        if steps is not None:
            given: dict[str, Any] = job.get("steps", {})
            given = {name: Path(value) if name in PATHS else value for name, value in given.items()}
            steps = replace(steps, **{"rests": False, "copy_engines": job["copy_engines"], **given})
        placement, groups = job.get("placement"), job.get("groups")
        llm = ParallelLLM(
            job["model"],
            self._launch,
            memory=job["memory"],
            dtype=job["dtype"],
            device=job.get("device", "auto"),
            balance=job["balance"],
            policy=policy,
            steps=steps,
            redundant_slots=job.get("redundant_slots"),
            placement=None if placement is None else Placement.from_json(placement),
            groups=[(size, n) for size, n in groups] if groups else None,
        )
        if not job.get("has_figures", True):
            llm.runner.recorder = llm.runner.layers.on_record = None
        llm.runner.min_half_rows = job.get("min_half_rows", llm.runner.min_half_rows)
        return llm

    def _listen(self, llm: ParallelLLM) -> None:
        """Keeps every layer of every pass, besides what the rank takes down anyway."""
        layers = llm.runner.layers
        assert layers.counts_LE is None, "whoever balances takes the counts"
        layers.counts_LE = counts_LE = np.zeros((len(layers.copies_L), llm.placement.num_experts), dtype=np.int64)
        take = layers.on_record

        def keep(record: LayerRecord) -> None:
            if take is not None:
                take(record)
            self._rows.append((record.routed_tokens, record.active_experts, record.compute_s))
            if record.layer + 1 == len(counts_LE):
                self._load.append(counts_LE.copy())
                counts_LE[:] = 0

        layers.on_record = keep

    def _save_records(self, layers: int) -> None:
        records_PLN = np.array(self._rows, dtype=float).reshape(-1, layers, 3)
        file = self._directory / f"records-{self._launch.rank}-{self._number}.npz"
        np.savez(file, records=records_PLN, load=np.array(self._load))

    def _loaded(self, copies: Sequence[int | None] = ()) -> None:
        """Waits until all ranks have loaded, and limits are as the layout says. ``copies``: those that run beside."""
        told = json.dumps({"copies": list(copies)})
        write_whole(self._directory / f"loaded-{self._launch.rank}-{self._number}.json", told)
        _await(self._directory / f"go-{self._number}.json")

    def _asked(self) -> tuple[list[Prompt], list[SamplingParams]]:
        """Prompts, those of the first pass last: queues are taken from the end."""
        prompts: list[Prompt] = [
            {"prompt_token_ids": ids} for ids in json.loads(Path(self._job["prompts"]).read_text())
        ]
        given = self._job["new_tokens"]
        tokens = given if isinstance(given, list) else [given] * len(prompts)
        params = [
            SamplingParams(max_tokens=count, ignore_eos=True, temperature=self._job.get("temperature", 0.0), seed=seed)
            for seed, count in enumerate(tokens)
        ]
        return prompts[::-1], params[::-1]

    def _stamp(self, progress: Progress) -> None:
        self._stamps_ns.append(perf_counter_ns())
        self._generated.append(progress.generated_tokens)
        if self._job.get("tells_passes"):
            (self._directory / f"passes-{self._number}.json").write_text(str(len(self._stamps_ns) - 1))

    def _facts(self, llm: ParallelLLM, made: Sequence[RequestOutput]) -> dict[str, Any]:
        figures, steps, balancing = llm.figures, llm.step_figures, llm.balancing
        return {
            "tokens": _tokens(made),
            "stamps_ns": self._stamps_ns,
            "generated": self._generated,
            "passes_in_halves": llm.runner.passes_in_halves,
            "figures": None if figures is None else figures.to_json(),
            "balanced": None if steps is None else steps.to_json(),
            "history": [] if balancing is None else [asdict(each) for each in balancing.history],
            "table": [] if balancing is None else balancing.table(),
        }


def _tokens(made: Sequence[RequestOutput]) -> list[list[int]]:
    """In the order in which prompts were given to the job."""
    return [list(each.outputs[0].token_ids) for each in made][::-1]


def _await(file: Path) -> str:
    while not file.exists():
        time.sleep(_POLL_S)
    return file.read_text()


if __name__ == "__main__":
    main()
