"""The expert-parallel benchmark on a tiny model: real ranks run its jobs, and its figures say what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.bench.parallel import exactness, pinned, scaling, unequal
from poise.bench.parallel import probe as probe_suite
from poise.bench.parallel.case import DTYPE, MEMORY, Case, one_rank, prefill_job, shared_ranks, write_rows
from poise.bench.parallel.contest import ORACLE, PROBE, STATIC, Contenders, contest
from poise.bench.parallel.probe_passes import Passes
from poise.bench.parallel.probe_tables import tables
from poise.bench.parallel.session import JobResult, Session
from poise.errors import PoiseError
from poise.model.random_checkpoint import make_checkpoint
from poise.spec.placement import Placement
from tests.conftest import VOCABULARY, MakeCheckpoint, tiny_config


def tiny_case(model: Path, rows: int = 64) -> Case:
    draw = np.random.default_rng(1)
    rows_of = {name: draw.integers(3, VOCABULARY, (rows, 32)) for name in ("profile", "measured")}
    return Case(name="tiny", model=model, rows=rows_of)


def skewed_case(target: Path) -> Case:
    """Popular experts whose many tokens take long beside what their weights take to travel."""
    make_checkpoint(tiny_config("qwen3_moe", moe_intermediate_size=256), target, dtype=DTYPE, skew=2.0)
    return tiny_case(target, rows=384)


def popular_first(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """A placement, as its file has it, with the most popular experts of each layer on rank 0: there, replicas pay."""
    load_PLE = session.run({**job, "balance": "static", "keeps_records": True}).load_PLE
    assert load_PLE is not None
    order_LS = np.argsort(-load_PLE.sum(axis=0), axis=1)
    return Placement(slot_to_expert_LS=order_LS.astype(np.int32), layers=(0, 1), num_experts=8, ranks=2).to_json()


def test_ranks_stay_for_several_jobs_and_placements_are_measured_beside_the_bound(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    case = tiny_case(checkpoint("qwen3_moe", DTYPE))
    prompts = write_rows(
        tmp_path / "prompts.json", [row[: 5 * n] for n, row in enumerate(case.rows["measured"][1:7], 1)]
    )
    job = {"model": str(case.model), "memory": MEMORY, "dtype": DTYPE, "prompts": prompts, "new_tokens": 20}
    with Session(shared_ranks(2)) as session:
        wanted = session.run({**job, "balance": "reference"}).facts["tokens"]
        balanced = session.run({**job, "balance": "eplb", "policy": {"interval": 4}}).facts
        longer = {**job, "new_tokens": exactness.NEW_TOKENS}
        wanted_longer = session.run({**longer, "balance": "reference"}).facts["tokens"]
        moving = session.run({**longer, **exactness.POLICIES["vibe that moves"]}).facts
        facts = unequal.measure(
            session, case, tmp_path, kinds=("profile", "measured"), rows_per_rank=4, passes=4, rounds=1
        )
        with pytest.raises(PoiseError, match=r"rank \d failed"):
            session.run({**job, "model": "no such model", "balance": "static"})
    assert balanced["tokens"] == wanted
    assert sum(each["moved_experts"] for each in balanced["history"]) > 0
    assert moving["tokens"] == wanted_longer
    assert sum(each["moved_experts"] for each in moving["history"]) > 0, "as its name says"
    assert len(balanced["stamps_ns"]) == balanced["figures"]["passes"] + 1
    assert facts["slots_per_rank"] == 6
    policies = facts["policies"]
    assert list(policies) == list(unequal.POLICIES)
    assert policies["token-balanced"]["token_imbalance"] < policies["contiguous"]["token_imbalance"] + 0.05
    for row in policies.values():
        assert facts["bound_s"] > 0
        assert row["bound_frac"] * row["expert_s"] == pytest.approx(facts["bound_s"])
        assert row["expert_s"] < row["step_s"]
        assert len(row["step_s_by_round"]) == 1


@pytest.mark.slow
def test_layouts_take_turns_when_scaling_is_measured(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = Session.run

    def noted(session: Session, job: Any, **more: Any) -> JobResult:
        ran.append(len(session.layout.ranks))
        return run(session, job, **more)

    monkeypatch.setattr(Session, "run", noted)
    monkeypatch.setattr(scaling, "LAYOUTS", (one_rank, lambda: shared_ranks(2)))
    rows = scaling.measure((tiny_case(checkpoint("qwen3_moe", DTYPE)),), tmp_path, passes=4)["rows"]
    assert ran == [1, 2, 2, 1] * 2
    assert [row["speedup"] for row in rows if row["layout"] == one_rank().name] == [1.0, 1.0]
    for row in rows:
        assert len(row["step_s_by_round"]) == scaling.ROUNDS
        assert min(row["step_s_by_round"]) <= row["step_s"] <= max(row["step_s_by_round"])
        assert row["passes"] >= (4 if "prefill" in row["pass"] else 2 * (scaling.NEW_TOKENS - scaling.WARM_UP))


@pytest.mark.slow
def test_a_part_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "poise", "bench", "parallel", "--part", "exact", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("*-parallel.json")
    rows = json.loads(file.read_text())["results"]["parts"]["exact"]["rows"]
    assert {row["ranks"] for row in rows} == {1, 2, 4}
    assert not any(row["different"] for row in rows)


def test_an_oracle_knows_every_count_and_figures_say_what_balancing_did(tmp_path: Path) -> None:
    case = skewed_case(tmp_path / "skewed")
    prompts = write_rows(tmp_path / "prompts.json", case.rows["measured"])
    job = {**prefill_job(case, prompts, rows_per_rank=32), "copy_engines": True}  # else no copy of such experts pays
    awake: Contenders = {"probe": {**PROBE["probe"], "steps": {"rests": False}}}
    with Session(shared_ranks(2)) as session:
        placed = {**job, "placement": popular_first(session, job)}
        assert session.run(job).passes_until(3 * 2 * 32) == 3, "each pass ends with a token of each prompt"
        facts = contest(session, placed, STATIC | awake | ORACLE, tmp_path, rounds=1, warm_up=3)
    assert list(facts) == ["static", "probe", "oracle"]
    assert facts["static"]["balanced"] is None
    assert facts["static"]["speedup"] == 1.0
    probe, oracle = facts["probe"]["balanced"], facts["oracle"]["balanced"]
    assert oracle["guessed_wrong_frac"] == 0.0
    assert 0.0 < probe["guessed_wrong_frac"] < 0.9
    for row in (probe, oracle):
        assert 1.6 < row["home_imbalance"] == pytest.approx(facts["static"]["token_imbalance"])
        assert 0 < row["replicas_used_per_pass"] <= row["replicas_planned_per_pass"]
        assert row["replica_bytes_per_pass"] > 0
    assert facts["oracle"]["token_imbalance"] < oracle["home_imbalance"] - 0.1
    assert probe["exposed_most_frac"] >= probe["exposed_frac"] > 0
    assert probe["predicting_of_experts_flops"] > oracle["predicting_of_experts_flops"] == 0.0
    assert tuple(probe_suite._Suite(Passes(tmp_path, tmp_path, 1), case).parts()) == probe_suite.PARTS
    assert [table.row_count for table in tables({"code": shown(facts)})] == [3, 2]


def test_ranks_with_cores_of_their_own_are_compared_without_quotas(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(3, VOCABULARY, (64, 32))
    case = Case(name="tiny", model=checkpoint("qwen3_moe", DTYPE), rows={pinned.KIND: rows})
    part = pinned.Part.named("2x1:decode:16")
    if len(os.sched_getaffinity(0)) < part.ranks:
        pytest.skip("there is only one core")
    facts = pinned.measure(part, case, tmp_path, steps=2, rounds=1, warm_up=4)
    assert facts["limits_enforced"] == ["rank 0: core 0", "rank 1: core 1"]
    assert list(facts["policies"]) == ["static", "eplb", "probe", "oracle"]
    assert [row["passes"] for row in facts["policies"].values()] == [2] * 4
    assert facts["policies"]["oracle"]["balanced"]["guessed_wrong_frac"] == 0.0
    assert [table.row_count for table in tables({"one": facts})] == [4, 2]


def test_more_cores_than_there_are_is_said_before_ranks_start(tmp_path: Path) -> None:
    rows = np.zeros((4, 32), dtype=np.int64)
    case = Case(name="tiny", model=tmp_path, rows={pinned.KIND: rows})
    with pytest.raises(PoiseError, match="9999 cores: this part needs more cores; rank 0: cores 0 to 9998: there are"):
        pinned.measure(pinned.Part.named("2x9999:prefill:64"), case, tmp_path, steps=1)
    with pytest.raises(PoiseError, match="33 tokens a rank are not 2 like rows"):
        pinned.measure(pinned.Part.named("2x1:prefill:33"), case, tmp_path, steps=1)
    with pytest.raises(PoiseError, match="part '8x2:prefill' is no RANKSxCORES:KIND:TOKENS"):
        pinned.Part.named("8x2:prefill")


def shown(policies: dict[str, Any]) -> dict[str, Any]:
    return {"pass": "prefill", "tokens_per_rank": 1, "layout": "", "model": "", "policies": policies}
