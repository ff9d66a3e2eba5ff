"""The offload benchmarks' arithmetic: what counts as decode, where limits come from, ratios, parts, what a result holds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.bench import run_benchmark
from poise.bench.offload.ablation import VARIANTS
from poise.bench.offload.case import CONFIG, MEMORY_BYTES, Outcome, ReferenceProducts, cache_bytes_per_token
from poise.bench.offload.contenders import add_limits, decode_passes
from poise.bench.offload.paper import best_of, ratios
from poise.bench.offload.planner import VARIANTS as VARIANTS_OF_PLANS
from poise.bench.offload.planner import Planned, planned_of
from poise.bench.offload.planner import ratios as planner_ratios
from poise.bench.offload.report import as_json, bubbles, guesses, memory, shares
from poise.bench.parts import Parts
from poise.bench.products import Products
from poise.cost.curves import PointCurve
from poise.errors import PoiseError, UsageError
from poise.plan.schedule import Policy
from poise.predict.hits import Hits
from poise.spec.trace import RoutingTrace

GB = 1_000_000_000


def one_pass(*, tokens: int, seconds: float = 3.0, finished: int = 0) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "bytes": 5,
        "tokens": tokens,
        "finished": finished,
        "computing_s": 0.5,
        "disk_busy_s": 1.0,
        "bubbles_s": {"compute wait": seconds / 2, "disk idle": seconds / 1000},
    }


def outcome(passes: list[dict[str, Any]], *, name: str = "Poise") -> Outcome:
    return Outcome(
        name=name,
        sequences=4,
        prompt_tokens=8,
        new_tokens=3,
        total_s=10.0,
        prefill_s=1.0,
        step_s=4.5,
        extrapolated_steps=0,
        read_bytes=0,
        step_bytes=0.0,
        peak_bytes=2 * GB,
        detail={
            "plan": {"base_bytes": GB // 2, "budget_bytes": 2 * GB},
            "peak_rss_bytes": 2 * GB,
            "prefill_ahead": Hits(named=8, used=8, hottest=6.0).as_json(),
            "decode_ahead": Hits().as_json(),
            "passes": passes,
        },
    )


def flat_products() -> ReferenceProducts:
    """Every product takes a millisecond, whatever its tokens."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    shapes = [(2 * inner, hidden), (hidden, inner), (3072, hidden), (hidden, 2048), (CONFIG["vocab_size"], hidden)]
    curve = PointCurve([1, 1_000_000], [1e-3, 1.0000001e-3])
    return ReferenceProducts(products=Products(curves=dict.fromkeys(shapes, curve), threads=1))


def test_tokens_per_second_count_every_sequence_s_new_tokens_over_the_whole_run() -> None:
    assert outcome([one_pass(tokens=4)]).tokens_per_s == pytest.approx(4 * 3 / 10.0)


def test_decode_is_every_full_pass_but_the_first() -> None:
    passes = [one_pass(tokens=2), one_pass(tokens=4), one_pass(tokens=4, seconds=2.0), one_pass(tokens=3)]
    assert decode_passes(passes) == [passes[2]]
    assert decode_passes([]) == []


def test_limits_come_from_the_recorded_passes_and_shrink_with_the_caches() -> None:
    layers, experts = 16, 64
    counts = np.zeros((3, layers, experts), dtype=np.int32)
    counts[:, :, :8] = 4
    trace = RoutingTrace(
        counts_NLE=counts, model="m", top_k=8, layers=tuple(range(layers)), tokens_per_step=(30_000, 4, 4)
    )
    passes = [one_pass(tokens=4), one_pass(tokens=4), one_pass(tokens=4)]
    plan = {"base_bytes": 300_000_000, "expert_bytes": 9_437_184, "dense_bytes": 373_436_928}
    add_limits(passes, trace, plan, flat_products(), 40)
    first, second, third = (each["limit"] for each in passes)
    assert first["fewest_bytes"] == 128 * 9_437_184, "all are read into empty memory"
    left = MEMORY_BYTES - 300_000_000 - 373_436_928 - 30_000 * cache_bytes_per_token() - 4 * 8192
    assert second["resident"] == left // 9_437_184 < 128
    assert second["fewest_bytes"] == pytest.approx((128 - second["resident"]) * 9_437_184)
    assert second["compute_s"] == pytest.approx(128 * 2e-3 + 16 * 2e-3 + 1e-3, rel=1e-3)
    assert third["seconds"] == max(third["disk_s"], third["compute_s"])


def test_a_finished_row_s_cache_is_gone() -> None:
    counts = np.ones((2, 16, 64), dtype=np.int32)
    trace = RoutingTrace(counts_NLE=counts, model="m", top_k=8, layers=tuple(range(16)), tokens_per_step=(64, 8))
    plan = {"base_bytes": 0, "expert_bytes": 9_437_184, "dense_bytes": 0}
    kept, freed = [one_pass(tokens=1), one_pass(tokens=1)], [one_pass(tokens=1, finished=1), one_pass(tokens=1)]
    for passes in (kept, freed):
        add_limits(passes, trace, plan, flat_products(), 64_000)
    assert freed[1]["limit"]["resident"] > kept[1]["limit"]["resident"]


def test_a_result_has_its_share_of_the_limit_its_bubbles_and_its_memory_beside_the_budget() -> None:
    passes = [one_pass(tokens=4) | {"limit": {"seconds": 1.5, "disk_s": 1.5, "compute_s": 1.0, "fewest_bytes": 9}}] * 2
    facts = as_json(outcome(passes))
    assert guesses(facts) == "prefill 100%, 75%", "nothing was read ahead in decode"
    assert facts["limit_frac"] == pytest.approx(0.5)
    assert facts["limit_tokens_per_s"] == pytest.approx(2 * 1.2)
    assert facts["added_bytes"] == 1.5 * GB
    assert memory(facts) == "2.00/2.50, 1.50/2.00"
    assert bubbles(facts) == "1.50 s compute wait", "a bubble of a thousandth is not worth a line"
    assert shares(passes)["limit_seconds"] == pytest.approx(1.5)
    assert shares(passes)["tokens"] == 4


def row(name: str, sequences: int, tokens_per_s: float) -> dict[str, Any]:
    return {"name": name, "sequences": sequences, "tokens_per_s": tokens_per_s, "limit_tokens_per_s": 60.0}


def test_the_ratio_is_of_the_best_runs_and_the_ceiling_of_the_limit() -> None:
    results = {
        "poise-512": {"rows": [row("Poise", 512, 40.0)]},
        "poise-1024": {"rows": [row("Poise", 1024, 50.0)]},
        "accelerate-4": {"rows": [row("Accelerate", 4, 0.4), row("Accelerate", 4, 0.5)]},
        "long-accelerate-4": {"rows": [row("Accelerate", 4, 0.1)]},
    }
    assert ratios(results, is_long=False) == {"4": {"ratio": 100.0, "ceiling": 120.0}}
    assert ratios(results, is_long=True) == {}, "Poise has not run there"
    assert best_of([row("Accelerate", 4, 0.4), row("Accelerate", 4, 0.5)])[4]["tokens_per_s"] == 0.5


def test_a_part_that_fails_stops_no_other_and_earlier_results_stay(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise PoiseError("the disk is gone")

    first = Parts(tmp_path, "bench", order=("a", "b", "c"), wanted=())
    first.run({"a": lambda: {"n": 1}, "b": fail, "c": lambda: {"n": 3}})
    assert [(part, result["n"]) for part, result in first.results().items()] == [("a", 1), ("c", 3)]
    with pytest.raises(PoiseError, match="1 of 3 parts failed: b: the disk is gone"):
        first.raise_if_failed()
    second = Parts(tmp_path, "bench", order=("a", "b", "c"), wanted=("b",))
    second.run({"a": fail, "b": lambda: {"n": 2}, "c": fail})
    second.raise_if_failed()
    assert [result["n"] for result in second.results().values()] == [1, 2, 3]
    assert {"date", "commit", "dirty"} <= set(second.results()["a"])
    assert json.loads((tmp_path / "parts" / "bench" / "b.json").read_text())["results"] == {"n": 2}


@pytest.mark.parametrize(
    ("name", "parts", "steps", "reason"),
    [
        ("offload", ("poise-7",), None, "has no part 'poise-7'; choose from: poise-512"),
        ("disk", ("x",), None, "has no parts; leave out --part and --steps"),
        ("offload", (), 0, "--steps is 0"),
    ],
)
def test_a_part_that_is_not_there_is_refused(name: str, parts: tuple[str, ...], steps: int | None, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run_benchmark(name, output=None, json_output=False, parts=parts, steps=steps)


def test_the_ablation_goes_from_the_simple_pipeline_to_ours_one_step_at_a_time() -> None:
    variants = list(VARIANTS.values())
    assert variants[0][1] == 1
    assert variants[0][2]["read_ahead"] == "layer"
    own = {"read_ahead": Policy().read_ahead, "order": Policy().order}
    assert own | VARIANTS["poise"][2] == own, "the engine's own way is forced to nothing"
    for (_, n, before), (_, m, after) in itertools.pairwise(
        (name, n, own | forced) for name, n, forced in variants[1:]
    ):
        assert n == m
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert len(changed - {"ahead"}) == 1


PLAN = Planned(batch_size=16, num_batches=8, ahead=4, slots=40, kv_on_disk=False, streamed=0)


def test_forced_plans_lie_around_the_planned_one() -> None:
    groups = {name: variant(PLAN).group for name, variant in VARIANTS_OF_PLANS.items()}
    assert groups["bs-half"] == (8, 16)
    assert groups["rows-quarter"] == (16, 2)
    assert VARIANTS_OF_PLANS["kv-other"](PLAN).options == {"kv_on_disk": True}
    assert VARIANTS_OF_PLANS["ahead-16"](PLAN).options == {"ahead": 16}
    alone = replace(PLAN, num_batches=1)
    assert VARIANTS_OF_PLANS["bs-double"](alone).is_as(alone, 16), "there are no more sequences"
    assert VARIANTS_OF_PLANS["ahead-1"](replace(PLAN, ahead=1)).is_as(replace(PLAN, ahead=1), 128)
    assert not VARIANTS_OF_PLANS["ahead-1"](PLAN).is_as(PLAN, 128)
    assert VARIANTS_OF_PLANS["rows-half"](alone).group == (8, 1), "one batch can only shrink"


def test_the_planner_is_held_against_the_best_of_the_sweep() -> None:
    def ran(rate: float) -> dict[str, Any]:
        return {"plan": {}, "decode_tokens_per_s": rate, "tokens_per_s": rate / 2}

    results = {
        "few-planned": ran(9.0),
        "few-planned-again": ran(11.0),
        "few-bs-half": ran(12.5),
        "few-kv-other": {"remark": "does not fit"},
        "many-planned": ran(100.0),
    }
    assert planner_ratios(results, "few") == pytest.approx(
        {"decode_tokens_per_s": 0.8, "tokens_per_s": 0.8, "spread_of_planned_runs": 11 / 9 - 1}
    )
    assert planner_ratios(results, "many")["tokens_per_s"] == 1.0
    with pytest.raises(PoiseError, match="run --part few-planned first"):
        planned_of({}, "few")
