"""What the expert-parallel benchmark makes of passes: recovery, summaries, tables, a picture."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from poise.bench.cluster.layout import ClusterLayout, RankLimits
from poise.bench.parallel import online, plot, probe_tables
from poise.bench.parallel.change import SETTLED, recovered_at
from poise.bench.parallel.contest import EVEN_LATELY, EVEN_TOKENS, _counted, _placed, contest
from poise.bench.parallel.session import JobResult
from poise.bench.parallel.tables import MAKERS, tables
from poise.bench.parallel.unequal import WARM_UP, costs_of, summary
from poise.errors import PoiseError


def test_recovery_is_when_steps_come_near_to_where_the_run_ends() -> None:
    slow_then_fast = [1.0] * 10 + [2.0] * 12 + [1.05] * 20
    assert recovered_at(slow_then_fast, 10) == 10, "the running median of 5 is fast two passes before all five are"
    assert recovered_at([1.0] * 30, 10) == 0, "it never left"
    assert recovered_at([1.0] * 10 + [2.0] * 20, 10) is None, "it stays as slow as it became"
    held_up = [1.0] * 10 + [2.0] * 3 + [1.0] + [2.0] * 6 + [1.0] * SETTLED
    assert recovered_at(held_up, 10) == 8, "one fast pass is not enough"


def result(seconds_R: list[float], pairs_R: list[float], passes: int) -> JobResult:
    """Two layers alike; warm-up passes are ten times as slow."""
    ranks = len(seconds_R)
    slow_P = np.where(np.arange(passes + WARM_UP) < WARM_UP, 10.0, 1.0)
    records = np.zeros((ranks, passes + WARM_UP, 2, 3))
    records[..., 0] = np.array(pairs_R)[:, None, None]
    records[..., 1] = 1.0
    records[..., 2] = np.array(seconds_R)[:, None, None] * slow_P[None, :, None]
    stamps_ns = np.concatenate([[0], np.cumsum(3 * max(seconds_R) * slow_P)]) * 1e9
    return JobResult(facts={"stamps_ns": stamps_ns.tolist()}, records_RPLN=records, load_RPLE=None)


def test_a_summary_takes_the_slowest_rank_of_each_layer_and_leaves_warm_up_out() -> None:
    facts = summary([result([1.0, 3.0], [10, 10], 5), result([1.0, 3.0], [10, 10], 5)], bound_s=4.0)
    assert facts["step_s"] == pytest.approx(9.0)
    assert facts["expert_s"] == pytest.approx(6.0)
    assert facts["bound_frac"] == pytest.approx(4 / 6)
    assert facts["time_imbalance"] == pytest.approx(1.5)
    assert facts["token_imbalance"] == pytest.approx(1.0)


def test_costs_are_those_of_ranks() -> None:
    costs = costs_of([result([1.0, 3.0], [10, 10], 40)])
    slow, fast = costs.seconds_LR(np.array([[10.0, 10.0]]), np.array([[1.0, 1.0]]))[0][::-1]
    assert slow == pytest.approx(3 * fast, rel=0.1)


CHANGE: dict[str, Any] = {
    "change": "text from code to prose",
    "model": "tiny",
    "commit": "0123456789",
    "policies": {
        name: {
            "change_at_pass": 2,
            "before_s": 0.1,
            "worst_s": 0.2,
            "end_s": 0.1,
            "total_after_s": 0.4,
            "detected_after_passes": detected,
            "detected_after_s": None if detected is None else 0.2,
            "recovered_after_passes": 2,
            "recovered_after_s": 0.3,
            "moves_before": 0,
            "moves_after": 7,
            "rearrangements": [[3, 7], [9, 1]],
            "step_s": [0.1, 0.1, 0.2, 0.2, 0.1],
        }
        for name, detected in (("vibe", 1), ("eplb", None))
    },
}


@dataclass
class Quick:
    """A session whose jobs take as long as they are told to."""

    layout: ClusterLayout
    ran: list[str] = field(default_factory=list)
    within_s: float = 0.0
    takes_s: float = 0.0

    def run(self, job: dict[str, Any]) -> JobResult:
        self.ran.append(job["balance"])
        time.sleep(self.takes_s)
        steps = {name: [1.0, 1.0] for name in ("imbalance", "time_imbalance", "slowest_s")}
        told = {"stamps_ns": [0, 2e9, 4e9], "figures": {"steps": steps}, "history": [], "balanced": None}
        return JobResult(facts=told, records_RPLN=None, load_RPLE=None)


def compared(session: Quick, directory: Path, within_s: float | None) -> dict[str, Any]:
    contenders = {name: {"balance": name} for name in ("static", "eplb")}
    until_s = None if within_s is None else time.monotonic() + within_s
    return contest(cast(Any, session), {}, contenders, directory, warm_up=1, until_s=until_s)


def test_contenders_take_turns_for_as_long_as_time_is_left(tmp_path: Path) -> None:
    layout = ClusterLayout(name="two", ranks=(RankLimits(),) * 2)
    whole = Quick(layout)
    assert [row["passes"] for row in compared(whole, tmp_path, None).values()] == [2, 2]
    assert whole.ran == ["static", "eplb", "eplb", "static"]
    cut = Quick(layout, takes_s=0.3)
    facts = compared(cut, tmp_path, 1.28)
    assert cut.ran == ["static", "eplb", "eplb"]
    assert [row["passes"] for row in facts.values()] == [1, 2]
    with pytest.raises(PoiseError, match="two: no time is left for a single run"):
        compared(Quick(layout), tmp_path, -1.0)


def test_tables_say_never_where_a_policy_did_not_move() -> None:
    (table,) = tables({"switch": CHANGE})
    moved = next(column for column in table.columns if column.header == "first move")
    assert list(moved.cells) == ["1 passes, 0.2 s", "never"]
    assert set(MAKERS) == {"exact", "unequal", "cut", "switch", "watching", "scaling", "halves"}


def test_recovery_is_drawn(tmp_path: Path) -> None:
    target = tmp_path / "recovery.png"
    plot.draw({"switch": CHANGE}, target, source="a file")
    assert target.read_bytes().startswith(b"\x89PNG")
    assert plot.smoothed([1.0, 9.0, 1.0, 1.0]) == [5.0, 1.0, 1.0, 1.0]


def test_learning_is_shown_by_blocks_of_passes_from_the_switch_on() -> None:
    passes, block = online.BEFORE + 2, online.BLOCK_PASSES
    wrong_P = [10.0] * online.BEFORE + [40.0, 20.0]
    steps = {
        name: [1.0] * passes for name in ("pass_s", "home_imbalance", "imbalance", "replicas_used", "learnt_steps")
    }
    told = {"steps": {**steps, "own_pairs": [100.0] * passes, "guessed_wrong": wrong_P}}
    told |= {"learnt_steps": 7.0, "learnt_late": 1.0, "learnt_frac": 0.02}
    stamps_ns = [1e9 * number for number in range(passes + 1)]
    ran = JobResult(facts={"balanced": told, "stamps_ns": stamps_ns}, records_RPLN=None, load_RPLE=None)
    row = online._facts(ran)
    assert row["guessed_wrong_frac"] == pytest.approx([0.1] * (online.BEFORE // block) + [0.3])
    assert row["step_s"] == pytest.approx([1.0] * len(row["guessed_wrong_frac"]))
    facts = {"block_passes": block, "passes_before": online.BEFORE, "layout": "", "model": "", "policies": {"one": row}}
    (table,) = probe_tables.tables({"online": facts})
    headers = [str(column.header) for column in table.columns]
    assert headers[1:4] == ["-16", "-8", "+0"]
    assert list(table.columns[3].cells) == ["30.0%"]


def test_passes_of_prompts_can_be_left_out_of_those_that_count() -> None:
    load_RPLE = np.ones((2, 8, 1, 4))
    load_RPLE[:, [0, 4]] = 8.0
    alone = _counted(load_RPLE, 2, 5, decode_alone=True)
    assert np.arange(8)[alone].tolist() == [2, 3, 5, 6]
    assert np.arange(8)[_counted(load_RPLE, 2, 5, decode_alone=False)].tolist() == [2, 3, 4, 5, 6]


def test_placements_are_made_from_all_passes_before_and_from_the_last_of_them() -> None:
    before = result([1.0, 1.0], [10, 10], 8)
    load_RPLE = np.ones((2, 8 + WARM_UP, 2, 4))
    load_RPLE[:, :6, :, 0] = 50.0
    load_RPLE[:, 6:, :, 3] = 50.0
    placed = _placed(replace(before, load_RPLE=load_RPLE), 8, 2)
    often = {name: np.bincount(made["layers"][0]["slot_to_expert"], minlength=4) for name, made in placed.items()}
    assert often[EVEN_TOKENS].argmax() == 0
    assert often[EVEN_LATELY].argmax() == 3
