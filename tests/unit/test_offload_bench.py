"""The offload benchmarks' arithmetic: what a limit counts, how a stopped baseline is completed, which passes are decode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from poise.bench.offload.ablation import VARIANTS, _row
from poise.bench.offload.case import READ_BYTES_PER_S, Outcome
from poise.bench.offload.report import limit_s


def outcome(passes: list[dict[str, Any]], *, slots: int = 10, sequences: int = 4) -> Outcome:
    return Outcome(
        name="Poise",
        sequences=sequences,
        prompt_tokens=8,
        new_tokens=3,
        total_s=10.0,
        prefill_s=1.0,
        measured_tokens=12,
        read_bytes=0,
        peak_bytes=None,
        detail={"plan": {"expert_slots": slots, "expert_bytes": READ_BYTES_PER_S // 10}, "passes": passes},
    )


def one_pass(*, tokens: int, hits: int, misses: int, seconds: float = 3.0, computing_s: float = 0.5) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "bytes": misses,
        "tokens": tokens,
        "hits": hits,
        "misses": misses,
        "computing_s": computing_s,
        "disk_busy_s": 1.0,
        "bubbles_s": {},
    }


def test_a_limit_takes_all_memory_for_experts_and_the_larger_of_disk_and_compute() -> None:
    reading = one_pass(tokens=4, hits=0, misses=30)
    computing = one_pass(tokens=4, hits=2, misses=9, computing_s=7.0)
    assert limit_s(outcome([reading])) == pytest.approx(2.0), "ten of thirty experts could have stayed: 20 x 0.1 s"
    assert limit_s(outcome([reading, computing])) == pytest.approx(2.0 + 7.0)


def test_tokens_per_second_count_every_sequence_s_new_tokens_over_the_whole_run() -> None:
    assert outcome([]).tokens_per_s == pytest.approx(4 * 3 / 10.0)


def test_the_ablation_counts_full_decode_passes_but_the_first() -> None:
    passes = [
        one_pass(tokens=2, hits=0, misses=5, seconds=50.0),
        one_pass(tokens=4, hits=0, misses=5, seconds=40.0),
        one_pass(tokens=4, hits=0, misses=5, seconds=2.0),
        one_pass(tokens=4, hits=0, misses=5, seconds=4.0),
    ]
    row = _row("variant", outcome(passes))
    assert row["tokens_per_s"] == pytest.approx(4 / 3.0)
    assert row["pass_s"] == [2.0, 4.0]


def test_the_ablation_goes_from_the_simple_pipeline_to_ours_one_step_at_a_time() -> None:
    assert VARIANTS[0][1] == 1
    assert VARIANTS[0][2]["read_ahead"] == "layer"
    for (_, n, before), (_, m, after) in itertools.pairwise(VARIANTS[1:]):
        assert n == m
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert len(changed - {"ahead"}) == 1
