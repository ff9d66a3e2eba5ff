"""The GGUF file made for llama.cpp holds the same model: its logits are those of transformers, its prompts run in parallel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poise.bench.offload.gguf import plan_tensors, write_gguf
from poise.errors import CheckpointError
from poise.model.checkpoint import open_checkpoint
from poise.model.inspect import load_config
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference

TOLERANCE = 1e-3


def test_every_tensor_has_its_place_and_experts_are_stacked_in_order(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("qwen3_moe", "bfloat16")
    opened = open_checkpoint(path)
    planned = plan_tensors(opened, load_config(opened))
    assert sum(len(tensor.parts) for tensor in planned) == len(opened.tensors)
    down = next(tensor for tensor in planned if tensor.name == "blk.1.ffn_down_exps.weight")
    assert down.shape == (8, 64, 32)
    assert down.dtype == "BF16"
    assert [part.name.split(".")[5] for part in down.parts] == [str(expert) for expert in range(8)]
    assert all(tensor.dtype == "F32" for tensor in planned if "norm" in tensor.name or "gate_inp" in tensor.name)


def test_what_llama_cpp_would_compute_differently_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs poise[peers]")
    for path in (checkpoint("qwen3_moe", norm_topk_prob=False), checkpoint("mixtral")):
        with pytest.raises(CheckpointError, match=r"norm_topk_prob|model_type"):
            write_gguf(path, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_computes_the_same_logits(
    checkpoint: MakeCheckpoint, reference: Reference, draw_prompts: DrawPrompts, tmp_path: Path, dtype: str
) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: poise[peers]")
    from poise.bench.llama_baseline import Session

    path = checkpoint("qwen3_moe", dtype)
    model = reference(path, torch.float32)
    write_gguf(path, tmp_path / "model.gguf")
    prompts, more = draw_prompts((9, 23, 4)), draw_prompts((1, 1, 1), seed=1)
    with Session(tmp_path / "model.gguf", sequences=3, context_tokens=64, threads=1, exact=True) as session:
        got = [session.step(prompts), session.step(more)]
    tolerance = TOLERANCE if dtype == "float32" else 0.05
    for step, logits_SV in enumerate(got):
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + more[row][:step]])
            with torch.inference_mode():
                expected_V = model(ids).logits[0, -1].numpy()
            assert np.abs(expected_V).max() > 1.0, "logits so small would agree by chance"
            np.testing.assert_allclose(logits_SV[row], expected_V, atol=tolerance)


def test_the_contender_runs_sequences_in_parallel_and_reports_each_step(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: poise[peers]")
    write_gguf(checkpoint("qwen3_moe", "bfloat16"), tmp_path / "model.gguf")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in draw_prompts((6, 6))))

    def run() -> dict[str, Any]:
        command = ["--model", str(tmp_path / "model.gguf"), "--prompts", str(prompts), "--max-tokens", "5"]
        done = subprocess.run(
            [sys.executable, "-m", "poise.bench.llama_baseline", *command], capture_output=True, text=True, check=True
        )
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    report = run()
    assert report["generated_tokens"] == 10
    assert len(report["steps_s"]) == len(report["steps_read_bytes"]) == 4
    assert all(seconds > 0 for seconds in report["steps_s"])
    assert report["token_ids"] == run()["token_ids"], "each sequence has its own seed"
    assert report["token_ids"][0] != report["token_ids"][1]
