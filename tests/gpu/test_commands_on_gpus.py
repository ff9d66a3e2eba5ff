"""`torchrun -m poise generate --expert-parallel --device cuda` as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.integration.test_expert_parallel_command import results, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def test_two_ranks_write_what_one_process_writes(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    prompts, alone, shared = (tmp_path / name for name in ("in.jsonl", "alone.jsonl", "shared.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in draw_prompts((9, 4, 21, 13, 6))))
    asked = ["generate", str(checkpoint("qwen3_moe")), "--prompts", str(prompts), "--max-tokens", "5", "--ignore-eos"]
    asked += ["--memory", "1GiB"]
    subprocess.run([sys.executable, "-m", "poise", *asked, "--output", str(alone)], check=True, timeout=100)
    parallel = [
        *asked,
        "--output",
        str(shared),
        "--expert-parallel",
        "--balance",
        "probe",
        "--device",
        "cuda",
        "--json",
    ]
    run = subprocess.run(torchrun(2, parallel), capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert results(shared) == results(alone)
    plan = json.loads(run.stdout)["plan"]
    assert (plan["balance"], plan["device"]) == ("probe", "cuda:0")
    if torch.cuda.device_count() == 1:
        assert run.stderr.count("2 ranks share 1 GPU, which NCCL refuses") == 1
