"""`poise plan`: what it prints adds up, is what `LLM` then runs, reads no weights, and refuses in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import poise
from poise import LLM, SamplingParams
from poise.cli.plan import PlanOptions, run_plan
from poise.engine.recorder import Recorder
from poise.errors import BudgetError, PromptError, TraceError, UsageError
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.predict.correlation import CorrelationTable
from poise.units import MIB
from tests.conftest import MakeCheckpoint

MODEL = Path(poise.__file__).parent / "assets" / "tiny-moe"
BUDGET = 110 * MIB
OPTIONS = PlanOptions(
    model=str(MODEL),
    prompt_file=None,
    num_requests=8,
    prompt_tokens=20,
    memory=str(BUDGET),
    device="auto",
    device_memory="auto",
    dtype="auto",
    quantize="none",
    machine=None,
    correlation_table=None,
    trace=None,
    sampling=SamplingParams(max_tokens=12, ignore_eos=True),
    json_output=True,
)


def planned(capsys: pytest.CaptureFixture[str], **changes: Any) -> dict[str, Any]:
    run_plan(replace(OPTIONS, **changes))
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_the_plan_adds_up_to_the_budget_and_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys)
    memory = [each for each in plan["tiers"] if each["tier"] == "memory"]
    assert sum(each["nbytes"] for each in memory) == plan["budget_bytes"] == BUDGET
    assert plan["predicted_tokens_per_s"] <= plan["bound_tokens_per_s"] * (1 + 1e-9)
    assert plan["bound_frac"] == plan["predicted_tokens_per_s"] / plan["bound_tokens_per_s"]
    assert plan["predicted_tokens_per_s"] == pytest.approx(8 * 12 / plan["predicted_s"])
    assert len(plan["inequalities"]) == 4
    speeds = [each["predicted_tokens_per_s"] for each in plan["alternatives"]]
    assert plan["predicted_tokens_per_s"] >= 0.98 * max(speeds)
    with LLM(MODEL, memory=BUDGET) as llm:
        llm.generate([{"prompt_token_ids": [5] * 20}] * 8, OPTIONS.sampling)
        facts = llm.describe()
    assert {key: facts[key] for key in ("batch_size", "num_batches", "chunk_tokens", "pass_tokens")} == plan["group"]
    for key in ("prefetch_experts", "expert_slots"):
        assert facts[key] == plan[key]


def test_it_plans_without_reading_weights(
    capsys: pytest.CaptureFixture[str], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A checkpoint whose tensors were cut off behind the headers plans as the whole one does."""
    for source in checkpoint("qwen3_moe", "bfloat16").iterdir():
        content = source.read_bytes()
        if source.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            with (tmp_path / source.name).open("wb") as stream:
                stream.write(content[:end])
                stream.truncate(len(content))
        else:
            (tmp_path / source.name).write_bytes(content)
    for quantize in ("none", "int4"):
        whole, cut = (
            planned(capsys, model=str(path), quantize=quantize)
            for path in (checkpoint("qwen3_moe", "bfloat16"), tmp_path)
        )
        assert whole == cut


def test_requests_come_from_a_prompt_file_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8], "max_tokens": 3}\n')
    plan = planned(capsys, prompt_file=str(prompts), num_requests=None, prompt_tokens=None)
    assert plan["requests"] == {"count": 2, "prompt_tokens": 4, "new_tokens": 15}
    prompts.write_text('{"prompt_token_ids": [5]}\n{"prompt_token_ids": [999999]}\n')
    with pytest.raises(PromptError, match=r"in.jsonl line 2: it has token id 999999"):
        planned(capsys, prompt_file=str(prompts), num_requests=None, prompt_tokens=None)


def test_recorded_routing_reads_less_than_uniform_routing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fingerprint = model_fingerprint(open_checkpoint(MODEL))
    with LLM(MODEL, memory="1GiB") as llm:
        table = CorrelationTable(num_layers=6, num_experts=32, top_k=4, forgets=False)
        recorder = Recorder(llm.spec, table=table)
        llm.runner.listen(recorder)
        llm.generate("def main():\n    print(", SamplingParams(max_tokens=60, ignore_eos=True))
    recorder.trace(f"tiny@{fingerprint}").save(tmp_path / "trace")
    table.save(tmp_path / "table", model=fingerprint)
    uniform = planned(capsys)
    for plan in (
        planned(capsys, trace=tmp_path / "trace"),
        planned(capsys, correlation_table=tmp_path / "table"),
    ):
        assert plan["decode"]["experts_used"] < uniform["decode"]["experts_used"]
        assert plan["routing"] != uniform["routing"]
    recorder.trace("another@0123").save(tmp_path / "other")
    with pytest.raises(TraceError, match="is of model another@0123, and this one is"):
        planned(capsys, trace=tmp_path / "other")


def test_the_tables_show_group_tiers_inequalities_and_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(replace(OPTIONS, json_output=False))
    shown = capsys.readouterr().out
    for text in (
        "batch group",
        "bottleneck",
        "with perfect overlap",
        "What lies where",
        "not used",
        "holds",
        "n x bs",
        "uniform",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_requests": 0}, "--num-requests is 0; it must be at least 1"),
        ({"num_requests": 100_001}, "--num-requests is 100001; it may be at most 100,000"),
        ({"prompt_tokens": 100_000}, "longer than the model's context"),
        ({"prompt_file": "x.jsonl"}, "leave out --num-requests"),
        ({"correlation_table": Path("a"), "trace": Path("b")}, "give one of them"),
        ({"quantize": "int3"}, "choose one of none, int4"),
        ({"machine": Path("none.json")}, "cannot be read"),
    ],
)
def test_bad_input_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_plan(replace(OPTIONS, **changes))


def test_a_budget_that_does_not_fit_names_the_smallest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BudgetError, match="the smallest that works is") as refused:
        planned(capsys, memory="1MiB")
    plan = planned(capsys, memory=str(refused.value.smallest_bytes))
    assert plan["expert_slots"] == 1
