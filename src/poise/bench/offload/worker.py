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


def main() -> None:
    """Runs the job."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    prompts = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    policy = Policy(**{key: job[key] for key in ("read_ahead", "order", "ahead") if key in job})
    groups = job.get("groups")
    start_s = time.perf_counter()
    with LLM(
        job["model"],
        memory=job["memory"],
        policy=policy,
        quantize=job.get("quantize", "none"),
        groups=[(size, n) for size, n in groups] if groups else None,
        kv_on_disk=job.get("kv_on_disk"),
        dense_layers=job.get("dense_layers"),
    ) as llm:
        load_s = time.perf_counter() - start_s
        timeline = Timeline()
        seen: list[tuple[int, Progress]] = []
        steps = job.get("decode_steps")
        full = 0
        recorder = Recorder(llm.spec)
        if job.get("routing"):
            llm.runner.listen(recorder)

        def on_progress(progress: Progress) -> None:
            nonlocal full
            before = seen[-1][1].generated_tokens if seen else 0
            seen.append((time.perf_counter_ns(), progress))
            full += progress.generated_tokens - before == len(prompts)
            if steps is not None and full > steps:
                raise _Enough

        # Sampled, each prompt with its own seed: a random model that decodes greedily repeats itself.
        params = [
            SamplingParams(max_tokens=job["new_tokens"], temperature=1.0, seed=index, ignore_eos=True)
            for index in range(len(prompts))
        ]
        begin_ns = time.perf_counter_ns()
        with contextlib.suppress(_Enough):
            llm.generate(prompts, params, on_progress=on_progress, timeline=timeline)
        plan = llm.describe()
        peak = llm.peak_bytes
    last = seen[-1][1]
    if job.get("routing"):
        recorder.trace(Path(job["model"]).name).save(Path(job["routing"]))
    if job.get("timeline"):
        write_chrome_trace(Path(job["timeline"]), chrome_trace(timeline.spans, asdict(last)))
    print(
        json.dumps(
            {
                "load_s": load_s,
                "elapsed_s": (seen[-1][0] - begin_ns) / 1e9,
                "prefill_s": next(((ns - begin_ns) / 1e9 for ns, each in seen if each.generated_tokens), None),
                "new_tokens": job["new_tokens"],
                "generated_tokens": last.generated_tokens,
                "bytes_read": last.bytes_read,
                "prefill_ahead": last.prefill_ahead.as_json(),
                "decode_ahead": last.decode_ahead.as_json(),
                "peak_rss_bytes": peak,
                "passes": _passes(begin_ns, seen, timeline.spans),
                "shares": asdict(time_shares(timeline.spans)),
                "plan": plan,
            }
        )
    )


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
