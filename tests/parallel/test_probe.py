"""Steps that are balanced by replicas give the tokens of plain transformers, whatever is predicted, comes late or moves."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.engine.vibe import Vibe
from poise.model.inspect import find_experts
from poise.parallel.launch import Launch
from poise.parallel.moe_layer import ExpertParallelLayers, LayerRecord
from poise.parallel.replica_staging import Outlet
from poise.parallel.replica_wire import Message
from poise.parallel.row_links import RowLinks
from poise.parallel.step_options import StepOptions
from poise.parallel.step_windows import Windows
from poise.plan.rebalance import Rebalance
from poise.report.chrome_trace import chrome_trace_of_ranks
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parallel.test_parallel_llm import PATIENT, Rotate, expected
from tests.ranks import start_ranks

TOKENS = 16
TINY_CHUNK = 200
"""Bytes: so small that a replica takes longer than one window."""
SERVE_S = 1e-3
"""For a chunk: no replica comes whole within one window."""
ATTENTION_S = 0.01


def dawdle_in(model: Any, token_s: float = 3e-3) -> None:
    """Replicas come only where tokens take long: else they do not pay, or have no time to come."""

    def dawdle(module: Any, rows: tuple[torch.Tensor, ...]) -> None:
        time.sleep(token_s * len(rows[0]))

    for module in find_experts(model, model.config.model_type):
        model.get_submodule(module.name).act_fn.register_forward_pre_hook(dawdle)


def records_of(layers: ExpertParallelLayers) -> list[LayerRecord]:
    """What the rank takes down of each layer from now on, beside whoever is told already."""
    records: list[LayerRecord] = []
    take = layers.on_record

    def keep(record: LayerRecord) -> None:
        if take is not None:
            take(record)
        records.append(record)

    layers.on_record = keep
    return records


def generate(
    launch: Launch,
    path: Path,
    prompts: list[list[int]],
    steps: StepOptions,
    policy: Rebalance | None,
    token_s: Sequence[float] = (3e-3,),
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """Tokens on rank 0, and what every rank took down of each layer. ``token_s``: of each rank in turn."""
    with ParallelLLM(
        path, launch, memory="2GiB", patience=PATIENT, balance="probe", steps=steps, policy=policy, groups=[(4, 2)]
    ) as llm:
        records = records_of(llm.runner.layers)
        dawdle_in(llm.runner.model, token_s[launch.rank % len(token_s)])
        made = []
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        history = llm.balancing.history if llm.balancing is not None else []
        return {
            "tokens": [list(each.outputs[0].token_ids) for each in made],
            "records": records,
            "moved": sum(each.moved_experts for each in history),
            "name": llm.describe()["balance"],
        }


@pytest.mark.parametrize(
    ("ranks", "steps", "policy"),
    [
        (2, StepOptions(predictor="last", rests=False, ahead="inline"), None),
        (4, StepOptions(predictor="gate", rests=False, ahead="inline"), None),
        (4, StepOptions(predictor="gate", rests=False, ahead="thread"), Rotate()),
        (2, StepOptions(predictor="gate", rests=False, ahead="thread", online=True), None),
        (4, StepOptions(predictor="none", rests=False), None),
        (4, StepOptions(predictor="last", suspends=False, chunk_bytes=1000, rests=False, ahead="inline"), Rotate()),
    ],
)
def test_greedy_tokens_are_those_of_each_prompt_alone_while_replicas_come(
    ranks: int,
    steps: StepOptions,
    policy: Rebalance | None,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9, 30, 3, 12, 8, 21))
    results = start_ranks(generate, ranks, tmp_path, path, prompts, steps, policy).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, TOKENS) for prompt in prompts]
    records_R = [result["records"] for result in results]
    used = sum(record.note.replicas_used for records in records_R for record in records)
    assert used > 0, "no replica came, so that nothing was tested"
    for layer in zip(*records_R, strict=True):
        routed = sum(record.routed_tokens for record in layer)
        if steps.ahead != "thread":
            assert sum(record.note.own_pairs for record in layer) in (0, routed), "all, or nobody was asked"
            assert not any(record.note.late for record in layer)
        assert sum(record.note.home_pairs for record in layer) == pytest.approx(routed)
        assert len({record.note.rested for record in layer}) == 1
        assert len({record.note.declined for record in layer if not record.note.late}) <= 1
    if policy is not None:
        assert results[0]["moved"] > 0
        assert results[0]["name"] == "probe+rotate"


def generate_seen(launch: Launch, path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """What the exported timeline has of every rank, on rank 0, while replicas come in tiny chunks, slower than thought."""
    steps = StepOptions(predictor="last", chunk_bytes=TINY_CHUNK, rests=False)
    serve = Outlet.chunk

    def dawdle(self: Outlet, asked: Message, rank: int) -> memoryview | None:
        time.sleep(SERVE_S)
        return serve(self, asked, rank)

    # In this rank's own process. Rates are not learnt, as the planner would soon ask for nothing from sources so slow.
    Outlet.chunk, Windows.fetched = dawdle, lambda *_: None  # type: ignore[method-assign,assignment]
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, balance="probe", steps=steps) as llm:
        dawdle_in(llm.runner.model)
        for module in llm.runner.model.modules():
            if type(module).__name__.endswith("Attention"):
                module.register_forward_pre_hook(lambda *_: time.sleep(ATTENTION_S))
        if launch.rank > 0:
            llm.follow()
            return {}
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, with_timelines=True)
        return chrome_trace_of_ranks([each.spans for each in llm.timelines])


def test_a_timeline_shows_fetches_in_parts_that_are_suspended_while_tokens_travel(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    """Only the chunk that is on its way may come meanwhile, which ends a fetch's last part. (Spans of exchanges have the
    packing of tokens in them, too, beside which the link is still free.)"""
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9, 30, 3, 12, 8, 21))
    trace = start_ranks(generate_seen, 2, tmp_path, path, prompts).results(within_s=120)[0]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    shown = 0
    for rank in {event["pid"] for event in events}:
        own = [event for event in events if event["pid"] == rank]
        travel = [event for event in own if event["name"] in ("dispatch", "combine")]
        parts = [event for event in own if event["name"].startswith("fetch, part")]
        pauses = [event for event in own if event["name"] == "suspended"]
        for part, after in pairwise(parts):
            if after["name"] == "fetch, part 1":
                continue
            assert not [each for each in travel if covers(part, each)], "it went on while tokens travelled"
            (pause,) = [each for each in pauses if each["ts"] == pytest.approx(part["ts"] + part["dur"], abs=0.01)]
            assert pause["ts"] + pause["dur"] == pytest.approx(after["ts"], abs=0.01)
            assert [each for each in travel if overlap(pause, each)], "no tokens travelled meanwhile"
            shown += part["args"]["bytes"] > 0 and after["args"]["bytes"] > 0
    assert shown, "no replica came in two parts"


def covers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["ts"] <= other["ts"] and other["ts"] + other["dur"] <= one["ts"] + one["dur"])


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"])


def test_on_unequal_ranks_experts_move_away_from_the_slow_one_while_replicas_come(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    """PROBE in front, ViBE behind, and the tokens of plain transformers."""
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 9, 3, 7, 4, 6, 8, 5))
    eager = Vibe(interval=2, least_gain_frac=-1.0, payback_steps=1_000_000)
    given = (StepOptions(rests=False), eager, (1e-3, 1e-3, 8e-3, 1e-3), 40)
    results = start_ranks(generate, 4, tmp_path, path, prompts, *given).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, 40) for prompt in prompts]
    assert results[0]["name"] == "probe+vibe"
    assert results[0]["moved"] > 0
    assert sum(record.note.replicas_used for result in results for record in result["records"]) > 0


def generate_with_late_plans(
    launch: Launch, path: Path, prompts: list[list[int]], steps: StepOptions
) -> dict[str, Any]:
    """Rank 1 now and then hears too late what is expected, and so has no plan for a layer for which rank 0 has one."""
    tell_all, calls = RowLinks.tell_all, itertools.count()

    def dawdle(self: RowLinks, row_N: Any) -> Any:
        heard_RN = tell_all(self, row_N)
        time.sleep(0.1 if next(calls) % 12 == 5 else 0.0)
        return heard_RN

    if launch.rank == 1:
        RowLinks.tell_all = dawdle  # type: ignore[method-assign]
    return generate(launch, path, prompts, steps, Rotate())


def test_a_plan_that_is_late_on_one_rank_keeps_nobody_waiting(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 17, 9, 30, 3, 12, 8, 21))
    steps = StepOptions(rests=False, ahead="thread")
    results = start_ranks(generate_with_late_plans, 2, tmp_path, path, prompts, steps).results(within_s=60)
    assert results[0]["tokens"] == [expected(reference(path), prompt, TOKENS) for prompt in prompts]
    notes = [[record.note for record in layer] for layer in zip(*(each["records"] for each in results), strict=True)]
    assert any(late.late and not there.late for there, late in notes), "no plan was late on one rank alone"
    assert any(there.replicas_used or late.replicas_used for there, late in notes), "and none was in time"
    assert all(there.rested == late.rested for there, late in notes)


@pytest.mark.parametrize("ahead", ["inline", "thread"])
def test_where_it_does_not_pay_balancing_rests_and_tokens_stay_the_same(
    ahead: str, checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    """Experts of microseconds: nothing is worth a prediction."""
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 9, 3))
    given = (StepOptions(ahead=ahead), None, (0.0,), 40)
    results = start_ranks(generate, 2, tmp_path, path, prompts, *given).results(within_s=120)
    assert results[0]["tokens"] == [expected(reference(path), prompt, 40) for prompt in prompts]
    rested_R = [[record.note.rested for record in result["records"]] for result in results]
    assert rested_R[0] == rested_R[1], "on all ranks alike"
    assert 20 < sum(rested_R[0]) < len(rested_R[0]) == 2 * 40
