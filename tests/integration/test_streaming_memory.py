"""Streaming dense weights and caches lowers what a process takes, and the lower budgets hold, as the kernel counts it.

As in test_memory, whose harness this uses: every case runs in a process of its own and its growth is the peak of the
resident set less what was resident when the model began to load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.integration.test_memory import _SHAPE, MB, Case

DENSE = {
    **_SHAPE,
    "vocab_size": 2048,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_hidden_layers": 16,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
"""16 layers of 8.4 MB of attention; experts of 0.4 MB. A row's cache takes 65 kB a token."""
CASES = {
    "all in memory": Case(model="dense", budget_bytes=330 * MB, jobs=[(2, 16, 4)], options={"kv_on_disk": False}),
    "dense weights do not fit": Case(
        model="dense", budget_bytes=140 * MB, jobs=[(2, 16, 4)], options={"kv_on_disk": False}
    ),
    "dense weights come and go": Case(
        model="dense",
        budget_bytes=300 * MB,
        jobs=[(2, 16, 40), (4, 300, 4), (2, 16, 40), (4, 300, 4)],
        options={"groups": [(1, 4)], "kv_on_disk": False},
    ),
    "caches in memory": Case(
        model="dense", budget_bytes=460 * MB, jobs=[(4, 500, 4)], options={"groups": [(1, 4)], "kv_on_disk": False}
    ),
    "caches on disk": Case(
        model="dense", budget_bytes=315 * MB, jobs=[(4, 500, 4)], options={"groups": [(1, 4)], "kv_on_disk": True}
    ),
    "neither fits": Case(
        model="dense", budget_bytes=150 * MB, jobs=[(4, 500, 4)], options={"groups": [(1, 4)], "kv_on_disk": True}
    ),
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What every case came to, by its name."""
    path = tmp_path_factory.mktemp("dense")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(**DENSE)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    work: dict[str, Any] = {name: [str(path), asdict(case)] for name, case in CASES.items()}
    for _, case in work.values():
        case["options"] |= {"dtype": "bfloat16"}
    harness = Path(__file__).with_name("test_memory.py")
    script = subprocess.run(
        [sys.executable, str(harness), json.dumps(work)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    made = {name: report for line in script.stdout.splitlines() for name, report in json.loads(line).items()}
    assert set(made) == set(CASES), script.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_process_never_grows_by_more_than_its_budget(name: str, grown: dict[str, dict[str, int]]) -> None:
    left = CASES[name].budget_bytes - grown[name]["grown"]
    print(f"{name}: budget {CASES[name].budget_bytes / MB:.0f} MB, left {left / MB:.1f} MB: {grown[name]}")
    assert left >= 0


def test_what_streams_does_not_lie_in_memory(grown: dict[str, dict[str, int]]) -> None:
    taken = {name: report["grown"] for name, report in grown.items()}
    assert taken["dense weights do not fit"] < taken["all in memory"] - 80 * MB
    assert taken["caches on disk"] < taken["caches in memory"] - 60 * MB
    assert taken["neither fits"] < taken["caches on disk"] - 80 * MB
