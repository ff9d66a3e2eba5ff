"""Timelines: what a run writes down accounts for its time, bubbles have names, and the file is what Perfetto opens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from poise import LLM, SamplingParams
from poise.plan.schedule import Policy
from poise.report.bubbles import BETWEEN_PASSES, time_shares
from poise.report.chrome_trace import chrome_trace, write_chrome_trace
from poise.spec.timeline import COMPUTE, DISK, Span, Timeline
from tests.conftest import MakeCheckpoint

SECOND = 1_000_000_000


def test_shares_count_overlapping_reads_once_and_name_every_bubble() -> None:
    spans = [
        Span(COMPUTE, "attention", 0, 2 * SECOND),
        Span(COMPUTE, "wait: expert not read yet", 2 * SECOND, 3 * SECOND),
        Span(COMPUTE, "expert", 3 * SECOND, 4 * SECOND),
        Span(f"{DISK}: a", "read", 0, 2 * SECOND, {"bytes": 10}),
        Span(f"{DISK}: b", "read ahead", SECOND, 3 * SECOND, {"bytes": 20}),
        Span(DISK, "idle: nothing more to read ahead", 3 * SECOND, 5 * SECOND),
    ]
    shares = time_shares(spans)
    assert shares.elapsed_s == 5
    assert shares.disk_busy_s == 3
    assert shares.disk_bytes == 30
    assert shares.compute_s == {"attention": 2, "expert": 1, BETWEEN_PASSES: 1}
    assert shares.computing_s == 4
    assert shares.bubbles_s == {
        "compute wait: expert not read yet": 1,
        "disk idle: nothing more to read ahead": 2,
        "disk idle: between reads": 0,
    }
    assert shares.bottleneck_frac == pytest.approx(0.8)
    assert time_shares([]).bottleneck_frac == 0.0


def test_a_span_counts_without_those_inside_it_and_a_gap_without_a_name_is_between_reads() -> None:
    spans = [
        Span(COMPUTE, "pass", 0, 10 * SECOND),
        Span(COMPUTE, "experts", SECOND, 8 * SECOND),
        Span(COMPUTE, "wait: expert not read yet", 2 * SECOND, 4 * SECOND),
        Span(COMPUTE, "expert", 4 * SECOND, 7 * SECOND),
        Span(f"{DISK}: a", "read", 0, 2 * SECOND, {"bytes": 10}),
        Span(f"{DISK}: a", "make weights", 2 * SECOND, 4 * SECOND),
        Span(DISK, "idle: closed", 3 * SECOND, 6 * SECOND),
        Span(f"{DISK}: caches", "write cache", 5 * SECOND, 8 * SECOND, {"bytes": 5}),
    ]
    shares = time_shares(spans)
    assert shares.compute_s == {"pass": 3, "experts": 2, "expert": 3, BETWEEN_PASSES: 0}
    assert shares.bubbles_s == {
        "compute wait: expert not read yet": 2,
        "disk idle: closed": 2,
        "disk idle: make weights": 1,
        "disk idle: between reads": 2,
    }
    assert (shares.disk_busy_s, shares.disk_bytes) == (5, 15)
    half = time_shares(spans, within=(3 * SECOND, 6 * SECOND))
    assert half.elapsed_s == 3
    assert {name: seconds for name, seconds in half.compute_s.items() if seconds} == {"expert": 2}
    assert half.bubbles_s["compute wait: expert not read yet"] == 1


@pytest.mark.parametrize("options", [{}, {"dense_layers": 0}, {"kv_on_disk": True}, {"policy": Policy(order="index")}])
def test_busy_time_and_named_bubbles_are_the_whole_of_every_pass(
    options: dict[str, Any], checkpoint: MakeCheckpoint
) -> None:
    timeline = Timeline()
    prompts = [{"prompt_token_ids": list(range(3 + k, 90 + k))} for k in range(4)]
    path = checkpoint("mixtral", num_hidden_layers=5, hidden_size=512, intermediate_size=1024)
    with LLM(path, memory="1GiB", expert_slots=4, groups=[(1, 4)], **options) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True), timeline=timeline)
    passes = [(span.begin_ns, span.end_ns) for span in timeline.spans if span.name == "pass"]
    assert len(passes) == 5
    for within in passes:
        shares = time_shares(timeline.spans, within=within)
        waited = sum(seconds for name, seconds in shares.bubbles_s.items() if name.startswith("compute"))
        idle = sum(seconds for name, seconds in shares.bubbles_s.items() if name.startswith("disk"))
        assert shares.computing_s + waited == pytest.approx(shares.elapsed_s, rel=1e-6)
        assert shares.disk_busy_s + idle == pytest.approx(shares.elapsed_s, rel=1e-6)
        assert shares.compute_s["pass"] < 0.1 * shares.elapsed_s, "time of the compute thread that no step accounts for"
        assert shares.bubbles_s["disk idle: between reads"] < 0.25 * shares.elapsed_s, "a gap that nobody named"


def test_a_run_s_timeline_holds_every_expert_every_read_and_no_two_things_at_once_on_a_track(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    timeline = Timeline()
    with LLM(checkpoint("qwen3_moe", "float32"), memory="1GiB", expert_slots=3, groups=[(1, 2)]) as llm:
        llm.generate(
            [{"prompt_token_ids": [3, 4, 5]}, {"prompt_token_ids": [6, 7]}],
            SamplingParams(max_tokens=3, ignore_eos=True),
            timeline=timeline,
        )
        reads, nbytes = llm._open().counters.reads, llm._open().counters.bytes_read
        layers = len(llm.spec.moe_layers)
    read = [span for span in timeline.spans if span.track.startswith(DISK) and span.name.startswith("read")]
    assert len(read) == reads
    assert sum(int(span.detail["bytes"]) for span in read) == nbytes
    assert {span.detail["batch"] for span in timeline.spans if span.name == "attention"} == {0, 1}
    assert {span.detail["layer"] for span in timeline.spans if span.name == "expert"} == set(range(layers))
    by_track: dict[str, list[Span]] = {}
    for span in sorted(timeline.spans, key=lambda each: each.begin_ns):
        by_track.setdefault(span.track, []).append(span)
    for track, spans in by_track.items():
        for one, next_ in itertools.pairwise(sorted(spans, key=lambda each: (each.begin_ns, -each.end_ns))):
            is_inside = track == COMPUTE and next_.end_ns <= one.end_ns
            assert one.end_ns <= next_.begin_ns or is_inside
    file = tmp_path / "timeline.json"
    write_chrome_trace(file, chrome_trace(timeline.spans))
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == set(by_track)
    assert len([event for event in events if event["ph"] == "X"]) == len(timeline.spans)


def test_times_in_the_file_are_microseconds_from_the_first_span() -> None:
    (name, event) = chrome_trace([Span(COMPUTE, "expert", 5_000_000, 7_500_000, {"layer": 1})])["traceEvents"]
    assert name["args"]["name"] == COMPUTE
    assert (event["ts"], event["dur"], event["args"]) == (0.0, 2500.0, {"layer": 1})


@pytest.mark.parametrize("order", ["index", "arrival"])
@pytest.mark.parametrize("read_ahead", ["none", "layer", "hot", "likely"])
@pytest.mark.parametrize("slots", [1, 3, 12])
def test_every_policy_generates_the_same_tokens(
    read_ahead: str, order: str, slots: int, checkpoint: MakeCheckpoint
) -> None:
    """Balancing changes where and when, never what."""
    path = checkpoint("qwen3_moe", "float32")
    prompts = [{"prompt_token_ids": [3 + k, 4, 5 * k + 1]} for k in range(4)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(path, memory="1GiB") as llm:
        want = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
    policy = Policy(read_ahead=read_ahead, order=order, ahead=2)  # type: ignore[arg-type]
    with LLM(path, memory="1GiB", expert_slots=slots, policy=policy, groups=[(2, 2)]) as llm:
        found = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
    assert found == want


def test_in_order_of_index_experts_compute_by_number_whatever_arrives_first(checkpoint: MakeCheckpoint) -> None:
    timeline = Timeline()
    policy = Policy(read_ahead="none", order="index")
    with LLM(checkpoint("qwen3_moe", "float32"), memory="1GiB", expert_slots=4, policy=policy) as llm:
        llm.generate(
            [{"prompt_token_ids": list(range(3, 20))}], SamplingParams(max_tokens=3, ignore_eos=True), timeline=timeline
        )
    order = [
        (int(span.detail["layer"]), int(span.detail["expert"])) for span in timeline.spans if span.name == "expert"
    ]
    within = [(one, two) for one, two in itertools.pairwise(order) if one[0] == two[0]]
    assert within
    assert all(one[1] < two[1] for one, two in within)
