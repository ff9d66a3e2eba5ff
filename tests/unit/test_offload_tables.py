"""What a reader of the offload benchmarks sees: the rows of their tables, and the picture drawn from a result file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from poise.bench.offload import ablation, like_for_like, llama, paper, planner
from poise.bench.offload.plot import main, read_series

GB = 1_000_000_000


def text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=260)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(name: str, sequences: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "name": name,
        "sequences": sequences,
        "new_tokens": 32,
        "extrapolated_steps": 23,
        "tokens_per_s": sequences / 2.0,
        "prefill_s": 7.5,
        "step_s": 2.0,
        "step_bytes": 1.5 * GB,
        "peak_bytes": 2.4 * GB,
        "memory_bytes": 2.5 * GB,
        "detail": {},
    }
    ours = {"added_bytes": 1.9 * GB, "budget_bytes": 2.0 * GB, "limit_frac": 0.91, "limit_tokens_per_s": 99.0}
    return decode() | facts | (ours if name == "Poise" else {}) | changes


def decode() -> dict[str, Any]:
    return {
        "pass_s": 2.0,
        "tokens": 16,
        "computing_s": 1.0,
        "disk_busy_s": 1.8,
        "bubbles_s": {"disk idle: nothing more to read ahead": 0.25},
        "limit_seconds": 1.6,
        "limit_disk_s": 1.6,
        "limit_compute_s": 0.7,
        "limit_fewest_bytes": 1.25 * GB,
        "limit_frac": 0.8,
        "tokens_per_s": 8.0,
    }


def alike_part(sequences: int) -> dict[str, Any]:
    result = {
        "sequences": sequences,
        "poise": row("Poise", sequences),
        "decode": decode(),
        "ratio": 1.3,
        "ceiling": 1.4,
    }
    return result | ({"accelerate": row("Accelerate", sequences, step_s=2.6)} if sequences < 100 else {})


def test_the_paper_s_table_has_ratio_ceiling_steps_memory_and_bubbles() -> None:
    results = {"poise-512": {"rows": [row("Poise", 512)]}, "accelerate-4": {"rows": [row("Accelerate", 4)]}}
    shown = text(paper._table(results, title="t", is_long=False))
    for part in ("8 of 31", "91%", "128.0x", "49.5x", "2.40/2.50, 1.90/2.00", "0.25 s disk idle"):
        assert part in shown


def test_the_like_for_like_table_has_the_limit_and_both_its_sides() -> None:
    shown = text(like_for_like._table({"16": alike_part(16), "512": alike_part(512)}))
    for part in ("80%", "1.25", "1.60", "0.70", "1.40x", "1.50/1.25", "8.00", "0.25 s disk idle"):
        assert part in shown


def test_llama_s_table_says_how_many_times_poise_is_faster() -> None:
    theirs = row("llama.cpp", 1, step_s=3.0, detail={"read_ahead_kib": 128})
    results = {"poise-1": {"rows": [row("Poise", 1)]}, "llama-1": {"rows": [theirs]}}
    shown = text(llama._table(results))
    assert "1.50x" in shown
    assert "128" in shown


def test_the_planner_s_and_the_ablation_s_tables_show_plans_and_bubbles() -> None:
    plan = {
        "batch_size": 16,
        "num_batches": 8,
        "prefetch_experts": 3,
        "expert_slots": 99,
        "kv_on_disk": True,
        "dense_layers_streamed": 5,
        "predicted_tokens_per_s": 7.7,
    }
    ran = {"name": "planned", "forced": {}, "plan": plan, "poise": row("Poise", 128), "decode": decode()}
    ran |= {"decode_tokens_per_s": 64.0, "tokens_per_s": 41.0}
    refused = {"name": "bs-double", "forced": {}, "remark": "does not fit"}
    shown = text(planner._table({"few-planned": ran, "few-bs-double": refused}, "few", {"tokens_per_s": 0.97}))
    for part in ("16 x 8", "0.970", "64.00", "41.00", "7.70", "does not fit", "0.25 s disk idle"):
        assert part in shown
    variant = {"name": "+ several batches", "poise": row("Poise", 256), "decode": decode()}
    assert "0.25 s disk idle" in text(ablation._table({"batches": variant}))


def test_the_picture_is_drawn_from_a_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: poise[report]")
    results = {"memory_bytes": 2.5 * GB, "parts": {"512": alike_part(512), "16": alike_part(16)}}
    limit, ours, theirs = read_series(results)
    assert limit.sequences == ours.sequences == (16, 512), "ascending"
    assert ours.tokens_per_s == (8.0, 8.0)
    assert theirs.sequences == (16,)
    document = {"name": "offload-alike", "stamp": {"cores": 2, "commit": "a" * 40}, "results": results}
    source, target = tmp_path / "r.json", tmp_path / "p.png"
    source.write_text(json.dumps(document))
    main([str(source), str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
    source.write_text(json.dumps(document | {"name": "disk"}))
    with pytest.raises(SystemExit) as left:
        main([str(source), str(target)])
    assert left.value.code == 2
    assert "give one of 'offload-alike'" in capsys.readouterr().err
