"""Dense weights and caches that leave memory change nothing: logits against plain transformers, each forced and both together.

Prompts of different length run in three batches of two rows, in chunks of eight, and end at different times, so that caches on
disk lose rows; experts go through one slot. What has streamed is counted, so that nothing passes by staying in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.errors import CheckpointError
from poise.offload.dense_stream import DenseCounters
from poise.offload.kv_stream import KvCounters
from poise.plan.dense import NUM_SLOTS
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parity.registry_configs import model_types
from tests.parity.registry_runs import LENGTHS as PROMPT_LENGTHS
from tests.parity.registry_runs import NEW_TOKENS as PROMPT_NEW_TOKENS
from tests.parity.registry_runs import SLOTS, Run, errors, plain_model, plain_runs, write_checkpoint
from tests.parity.registry_runs import prompts as registry_prompts
from tests.parity.registry_table import TOLERANCE as REGISTRY_TOLERANCE

LENGTHS = (5, 41, 1, 17, 33, 9, 2)
NEW_TOKENS = (8, 3, 6, 8, 5, 2, 7)
TOLERANCE = {"qwen3_next": 1e-4}
"""1e-5 for all others. Recurrent layers sum in chunks of their own, as in test_parity."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 5},
    "mixtral": {"num_hidden_layers": 5},
    "deepseek_v3": {"num_hidden_layers": 6, "first_k_dense_replace": 3},
    "gpt_oss": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    },
    "qwen3_next": {"num_hidden_layers": 8},
    "granitemoe": {"num_hidden_layers": 5},
}
"""What differs from ``conftest.CONFIGS``: more layers than slots, and for DeepSeek three in a row without experts."""
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"dense_layers": 0},
    "some-dense": {"dense_layers": 2},
    "kv": {"kv_on_disk": True},
    "both": {"dense_layers": 0, "kv_on_disk": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_streams_changes_no_logits(
    architecture: str,
    way: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = checkpoint(architecture, **ARCHITECTURES[architecture])
    model, prompts, options = reference(path), draw_prompts(LENGTHS), WAYS[way]
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    passes = 0

    def count(_: object) -> None:
        nonlocal passes
        passes += 1

    with LLM(path, memory="1GiB", expert_slots=1, groups=[(2, 3)], scratch_directory=tmp_path, **options) as llm:
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in NEW_TOKENS],
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V),
            on_progress=count,
        )
        dense, kv = counters(llm)
        streamed = int(str(llm.describe()["dense_layers_streamed"]))
    for ids, result in zip(prompts, results, strict=True):
        new_ids = list(result.outputs[0].token_ids)
        with torch.no_grad():
            want_TV = model(torch.tensor([ids + new_ids])).logits[0, len(ids) - 1 : -1]
        error = (torch.stack(seen[result.index]) - want_TV).abs().max() / want_TV.abs().max()
        assert error <= TOLERANCE.get(architecture, 1e-5)
    num_layers = len(model.model.layers)
    assert streamed == (num_layers - options["dense_layers"] if "dense_layers" in options else 0)
    if dense is not None:
        assert passes * streamed <= dense.reads <= (passes + 2) * streamed + 2, "a layer is read once in a pass"
    if kv is not None:
        assert kv.bytes_read > passes * 4096
        assert kv.late <= 2 * num_layers, "the next past is not read ahead"


def counters(llm: LLM) -> tuple[DenseCounters | None, KvCounters | None]:
    """What has been streamed so far."""
    dense, kv = llm._loaded().stream, llm._kv
    return dense.counters if dense is not None else None, kv.counters if kv is not None else None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_every_class_of_the_registry_streams_both(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain transformers, as in test_registry; what a class does not allow to leave memory stays."""
    monkeypatch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))
    try:
        write_checkpoint(tmp_path, model_type)
        plain = plain_runs(plain_model(tmp_path))
    except Exception as error:  # noqa: BLE001  # whatever transformers raises
        pytest.skip(f"transformers itself cannot run {model_type}: {error}")
    options: dict[str, Any] = {"groups": [(2, 2)], "kv_on_disk": True, "dense_layers": 0}
    try:
        llm = LLM(tmp_path, memory="1GiB", expert_slots=SLOTS, **options)
    except CheckpointError as error:
        pytest.skip(str(error))
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(PROMPT_LENGTHS))}
    with llm:
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in registry_prompts()],
            [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in PROMPT_NEW_TOKENS],
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V.float()),
        )
        assert int(str(llm.describe()["dense_layers_streamed"])) > NUM_SLOTS
    ours = [Run(new_ids=list(each.outputs[0].token_ids), logits_TV=torch.stack(seen[each.index])) for each in results]
    assert max(errors(ours, plain)) <= REGISTRY_TOLERANCE
