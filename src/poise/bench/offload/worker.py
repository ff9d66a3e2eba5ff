"""One run of Poise as a process of its own: takes a JSON job as its only argument, prints one JSON line.

Keys: ``model``, ``prompts`` (JSONL of token ids), ``new_tokens``, ``memory``; optional ``groups`` ([[batch size, batches]]),
``read_ahead``, ``order``, ``ahead``, ``quantize``, ``kv_on_disk``, ``dense_layers``, ``decode_steps`` (stop after so many
passes, behind a first, in which every prompt got a token), ``timeline`` and ``routing`` (files: the Chrome trace; the routing
trace of the passes).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poise.engine.llm import LLM
from poise.engine.recorder import Recorder
from poise.engine.request import Progress
from poise.engine.sampling import SamplingParams
from poise.plan.schedule import Policy
from poise.report.bubbles import time_shares
from poise.report.chrome_trace import chrome_trace, write_chrome_trace
from poise.spec.timeline import Span, Timeline


class _Enough(Exception):  # noqa: N818 - it is no error
    """As many decode steps as were asked for have run."""


class _Watch:
    """Notes every pass, and ends the run behind ``steps`` decode steps, None: never."""

    def __init__(self, sequences: int, steps: int | None) -> None:
        self.seen: list[tuple[int, Progress]] = []
        self._sequences, self._steps = sequences, steps
        self._full = 0

    def __call__(self, progress: Progress) -> None:
        before = self.seen[-1][1].generated_tokens if self.seen else 0
        self.seen.append((time.perf_counter_ns(), progress))
        self._full += progress.generated_tokens - before == self._sequences
        if self._steps is not None and self._full > self._steps:
            raise _Enough


def main() -> None:
    """Runs the job."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    prompts = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    watch, timeline = _Watch(len(prompts), job.get("decode_steps")), Timeline()
    start_s = time.perf_counter()
    with _open(job) as llm:
        load_s = time.perf_counter() - start_s
        recorder = Recorder(llm.spec)
        if job.get("routing"):
            llm.runner.listen(recorder)
        # Sampled, each prompt with its own seed: a random model that decodes greedily repeats itself.
        params = [
            SamplingParams(max_tokens=job["new_tokens"], temperature=1.0, seed=index, ignore_eos=True)
            for index in range(len(prompts))
        ]
        begin_ns = time.perf_counter_ns()
        with contextlib.suppress(_Enough):
            llm.generate(prompts, params, on_progress=watch, timeline=timeline)
        asked = {"load_s": load_s, "new_tokens": job["new_tokens"]}
        taken = {"peak_rss_bytes": llm.peak_bytes, "plan": llm.describe()}
    if job.get("routing"):
        recorder.trace(Path(job["model"]).name).save(Path(job["routing"]))
    if job.get("timeline"):
        write_chrome_trace(Path(job["timeline"]), chrome_trace(timeline.spans, asdict(watch.seen[-1][1])))
    print(json.dumps(asked | _figures(begin_ns, watch.seen, timeline.spans) | taken))


def _open(job: dict[str, Any]) -> LLM:
    groups = job.get("groups")
    return LLM(
        job["model"],
        memory=job["memory"],
        policy=Policy(**{key: job[key] for key in ("read_ahead", "order", "ahead") if key in job}),
        quantize=job.get("quantize", "none"),
        groups=[(size, n) for size, n in groups] if groups else None,
        kv_on_disk=job.get("kv_on_disk"),
        dense_layers=job.get("dense_layers"),
    )


def _figures(begin_ns: int, seen: list[tuple[int, Progress]], spans: list[Span]) -> dict[str, Any]:
    """Of the run and of every pass."""
    end_ns, last = seen[-1]
    return {
        "elapsed_s": (end_ns - begin_ns) / 1e9,
        "prefill_s": next(((ns - begin_ns) / 1e9 for ns, each in seen if each.generated_tokens), None),
        "generated_tokens": last.generated_tokens,
        "bytes_read": last.bytes_read,
        "prefill_ahead": last.prefill_ahead.as_json(),
        "decode_ahead": last.decode_ahead.as_json(),
        "passes": _passes(begin_ns, seen, spans),
        "shares": asdict(time_shares(spans)),
    }


def _passes(begin_ns: int, seen: list[tuple[int, Progress]], spans: list[Span]) -> list[dict[str, Any]]:
    """Of every pass: seconds, bytes, tokens, and where its time went."""
    passes = []
    before: Progress | None = None
    for end_ns, progress in seen:
        shares = time_shares(spans, within=(begin_ns, end_ns))
        passes.append(
            {
                "seconds": (end_ns - begin_ns) / 1e9,
                "bytes": progress.bytes_read - (before.bytes_read if before else 0),
                "tokens": progress.generated_tokens - (before.generated_tokens if before else 0),
                "finished": progress.finished,
                "misses": progress.expert_misses - (before.expert_misses if before else 0),
                "hits": progress.expert_hits - (before.expert_hits if before else 0),
                "computing_s": shares.computing_s,
                "disk_busy_s": shares.disk_busy_s,
                "bubbles_s": shares.bubbles_s,
            }
        )
        begin_ns, before = end_ns, progress
    return passes


if __name__ == "__main__":
    main()
