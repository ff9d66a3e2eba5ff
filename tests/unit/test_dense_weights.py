"""Dense weights between calls: what the next call plans stays or streams, the text is the same, a failing disk is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from poise import LLM, SamplingParams
from poise.engine.request import Prompt
from poise.errors import BudgetError, ReadError, UsageError
from poise.offload.dense_stream import NUM_SLOTS
from tests.conftest import DrawPrompts, tiny_config, write_checkpoint

OPTIONS = {"groups": [(1, 4)], "kv_on_disk": False}
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 3 MB of attention; a token's cache takes 32 kB."""
    config = tiny_config(
        "mixtral", num_hidden_layers=8, hidden_size=512, intermediate_size=64, vocab_size=128, num_key_value_heads=4
    )
    return write_checkpoint(tmp_path_factory.mktemp("dense"), config, torch.float32)


@pytest.fixture
def short(draw_prompts: DrawPrompts) -> list[Prompt]:
    return [{"prompt_token_ids": ids} for ids in draw_prompts((3, 5))]


@pytest.fixture
def long(draw_prompts: DrawPrompts) -> list[Prompt]:
    """Caches of 32 MB: more than the dense weights that can stream."""
    return [{"prompt_token_ids": ids} for ids in draw_prompts((240,) * 4)]


def ids_of(llm: LLM, prompts: list[Prompt]) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompts, PARAMS)]


def streamed(llm: LLM) -> int:
    return int(str(llm.describe()["dense_layers_streamed"]))


def smallest_budget(path: Path, prompts: list[Prompt]) -> int:
    with pytest.raises(BudgetError) as refused:
        LLM(path, memory=1, expected=[(prompt, PARAMS) for prompt in prompts], **OPTIONS)  # type: ignore[arg-type]
    return refused.value.smallest_bytes


def test_each_call_has_its_dense_weights_where_it_is_fastest(
    path: Path, short: list[Prompt], long: list[Prompt]
) -> None:
    with LLM(path, memory="1GiB", **OPTIONS) as llm:  # type: ignore[arg-type]
        want = ids_of(llm, short), ids_of(llm, long)
        assert streamed(llm) == 0
    found = []
    with LLM(path, memory=smallest_budget(path, long), **OPTIONS) as llm:  # type: ignore[arg-type]
        for _ in range(2):
            found.append((ids_of(llm, short), ids_of(llm, long)))
            assert streamed(llm) > NUM_SLOTS, "the caches of long prompts leave no room for all dense weights"
        ids_of(llm, short * 8)
        assert streamed(llm) == 0, "32 passes and more are faster when no dense weights are read in them"
    assert found == [want, want]


def test_a_disk_that_fails_meanwhile_closes_the_model_and_says_so(
    path: Path, short: list[Prompt], long: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(path, memory=smallest_budget(path, long), **OPTIONS) as llm:  # type: ignore[arg-type]
        ids_of(llm, long)

        def fail(_: object) -> torch.Tensor:
            raise ReadError("reading failed: Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr("poise.engine.dense_weights.read_tensor", fail)
            with pytest.raises(ReadError):
                ids_of(llm, short * 8)
        with pytest.raises(UsageError, match="closed"):
            ids_of(llm, short)
