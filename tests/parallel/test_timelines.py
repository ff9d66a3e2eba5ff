"""Ranks' figures and timelines as rank 0 has them: complete, on one clock, and with nothing left of the call before."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.rank_recorder import INTERVAL
from poise.engine.sampling import SamplingParams
from poise.parallel.group import RankGroup
from poise.parallel.launch import Launch
from poise.parallel.timelines import clock_offsets, gather_timelines
from poise.spec.timeline import COMPUTE, EXCHANGE, MIGRATION, Span
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.parallel.test_parallel_llm import PATIENT, Rotate
from tests.ranks import start_ranks

AHEAD_NS = 5_000_000_000


def compare_clocks(launch: Launch) -> Any:
    """Rank r's clock is r times five seconds ahead."""
    with RankGroup(launch, {}, patience=PATIENT) as group:
        offsets = clock_offsets(group, clock=lambda: perf_counter_ns() + launch.rank * AHEAD_NS)
        span = Span(COMPUTE, f"of {launch.rank}", perf_counter_ns(), perf_counter_ns(), {"bytes": launch.rank})
        return offsets, gather_timelines(group, [span] * launch.rank)


def test_clocks_are_compared_and_spans_come_to_rank_0(tmp_path: Path) -> None:
    (offsets, timelines), *others = start_ranks(compare_clocks, 3, tmp_path).results()
    assert others == [((), ())] * 2
    for rank, offset in enumerate(offsets):
        assert abs(offset.ahead_ns - rank * AHEAD_NS) <= offset.error_ns
        assert offset.error_ns < 1_000_000_000
    assert [[span.name for span in each.spans] for each in timelines] == [[], ["of 1"], ["of 2"] * 2]
    assert timelines[2].spans[0].detail == {"bytes": 2}


def generate(launch: Launch, path: Path, prompts: list[list[int]]) -> Any:
    """A call with timelines while experts move, then one without."""
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, policy=Rotate(interval=16)) as llm:
        if launch.rank > 0:
            llm.follow()
            return llm.figures, llm.timelines
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        llm.generate(asked, SamplingParams(max_tokens=INTERVAL + 6, ignore_eos=True), with_timelines=True)
        seen = llm.figures, llm.timelines
        llm.generate(asked[:1], SamplingParams(max_tokens=3, ignore_eos=True))
        return *seen, llm.figures, llm.timelines


@pytest.fixture(scope="module")
def seen(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    work = tmp_path_factory.mktemp("ranks")
    return start_ranks(generate, 2, work, checkpoint("qwen3_moe"), draw_prompts((5, 9, 7))).results(within_s=120)


def test_figures_are_of_the_last_call_and_of_all_its_passes(seen: list[Any]) -> None:
    (figures, _, again, _), others = seen
    assert others == (None, ())
    assert (figures.passes, again.passes) == (INTERVAL + 6, 3)
    layers = len(figures.imbalance_L)
    assert figures.pairs_R.sum() == layers * 2 * ((5 + 9 + 7) + 3 * (INTERVAL + 5)), "every token goes to two experts"
    assert (figures.imbalance_P >= 1.0).all()
    assert (figures.pass_s_P >= figures.slowest_s_P).all()
    busy_R = figures.expert_s_R + figures.rest_s_R + figures.exchange_s_R
    assert (busy_R <= figures.pass_s_P.sum() * 1.01).all()
    assert (figures.sent_bytes_R > 0).all()


def test_every_rank_has_a_timeline_with_all_that_it_did(seen: list[Any]) -> None:
    (figures, timelines, _, without), _ = seen
    assert without == ()
    assert [each.rank for each in timelines] == [0, 1]
    for each in timelines:
        names = {(span.track, span.name) for span in each.spans}
        assert {
            (COMPUTE, "attention"),
            (COMPUTE, "expert"),
            (COMPUTE, "wait: agreement"),
            (COMPUTE, "wait: rows"),
            (COMPUTE, "wait: outputs"),
            (EXCHANGE, "wait: last rank"),
            (EXCHANGE, "dispatch"),
            (EXCHANGE, "combine"),
            (MIGRATION, "move experts"),
        } <= names
        assert len([span for span in each.spans if span.name == "pass"]) == figures.passes


def test_a_pass_overlaps_itself_on_all_ranks(seen: list[Any]) -> None:
    """On one clock, no rank has ended a pass before another one has begun it."""
    timelines = seen[0][1]
    passes_R = [[span for span in each.spans if span.name == "pass"] for each in timelines]
    slack_ns = max(each.clock.error_ns for each in timelines)
    for one, other in zip(*passes_R, strict=True):
        assert one.begin_ns < other.end_ns + slack_ns
        assert other.begin_ns < one.end_ns + slack_ns
