"""Damage that only shows when one looks closer: stale indexes, pickles in disguise, weights that are no numbers.

The basics (missing, truncated and malformed files, shapes, budgets, prompts) are in ``test_checkpoint_errors``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise import LLM, SamplingParams
from poise.errors import CheckpointError
from tests.conftest import MakeCheckpoint
from tests.quantised_checkpoints import Tensors, change_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAN, INFINITY = float("nan"), float("inf")
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def root(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def refusal_of(path: Path, **options: Any) -> str:
    """The one line with which a directory is refused, on loading or when it generates."""
    with (
        pytest.raises(CheckpointError) as refusal,
        LLM(path, memory="1GiB", **options) as llm,
    ):
        llm.generate([{"prompt_token_ids": list(range(3, 40))}], GREEDY)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def index_of(path: Path, **more: str) -> None:
    """An index over the one file, with more in it than the file holds."""
    weight_map = dict.fromkeys(load_file(path / WEIGHTS), WEIGHTS) | more
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_an_absent_tensor(root: Path) -> None:
    index_of(root, **{"model.layers.7.mlp.gate.weight": WEIGHTS})
    assert re.search(
        r"model\.safetensors holds tensor model\.layers\.7\.mlp\.gate\.weight; it does not", refusal_of(root)
    )


@pytest.mark.parametrize("shard", [3, None, "../model/model.safetensors", "", ["a"]])
def test_an_index_that_names_no_file(shard: Any, root: Path) -> None:
    index_of(root, **{"lm_head.weight": shard})
    assert re.search(r"index\.json: lm_head\.weight is in .* no file name", refusal_of(root))


def test_numbered_shards_of_which_some_are_missing_and_no_index(root: Path) -> None:
    (root / WEIGHTS).rename(root / "model-00002-of-00003.safetensors")
    assert "holds 1 of 3 shards" in refusal_of(root)


def test_a_link_that_leads_nowhere(root: Path) -> None:
    (root / WEIGHTS).rename(root / "elsewhere")
    (root / WEIGHTS).symlink_to(root / "blob")
    assert re.search(r"model\.safetensors cannot be read: No such file", refusal_of(root))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt", "model.pt", "model.pkl"])
def test_a_pickle_is_never_opened(name: str, root: Path) -> None:
    (root / WEIGHTS).unlink()
    (root / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/poise-was-here'\ntR.")
    assert "pickled weights only, which can run code; convert them to safetensors" in refusal_of(root)
    assert not Path("/tmp/poise-was-here").exists()


def test_a_pickle_under_the_name_of_safetensors(root: Path) -> None:
    torch.save({"lm_head.weight": torch.ones(2)}, root / WEIGHTS)
    assert re.search(r"model\.safetensors is not a whole safetensors file", refusal_of(root))


def test_gate_and_up_that_only_fit_together(root: Path) -> None:
    """Their rows add up, so that a plain concatenation would take them."""

    def uneven(tensors: Tensors) -> None:
        begin = "model.layers.1.mlp.experts.3"
        tensors[f"{begin}.gate_proj.weight"], tensors[f"{begin}.up_proj.weight"] = (
            torch.ones(16, 64),
            torch.ones(48, 64),
        )

    change_tensors(root, uneven)
    assert re.search(r"experts\.3\.gate_proj\.weight \[16, 64\] and .*up_proj\.weight \[48, 64\]", refusal_of(root))


def test_fused_experts_of_another_width(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("granitemoe"), tmp_path / "model"))
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    change_tensors(path, lambda tensors: tensors.update({name: torch.ones(4, 192, 32)}))
    assert re.search(
        r"layers\.0\..*input_linear\.weight\[0\] \[192, 32\]: config\.json asks for \[192, 64\]", refusal_of(path)
    )


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_dense_weight_that_is_no_number_is_named_when_it_has_spoilt_the_output(
    value: float, temperature: float, root: Path
) -> None:
    change_tensors(root, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].view(-1)[5].fill_(value))
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=temperature, top_k=20, top_p=0.9, seed=0)
    with LLM(root, memory="1GiB") as llm, pytest.raises(CheckpointError) as refusal:
        llm.generate({"prompt_token_ids": [5, 6, 7]}, params)
    assert re.search(
        r"(nan|inf): tensor model\.layers\.1\.self_attn\.v_proj\.weight holds NaN or infinite", str(refusal.value)
    )


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_an_expert_that_is_no_number_is_named_while_it_is_in_memory(
    architecture: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(checkpoint(architecture), tmp_path / "model"))

    def spoil(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if re.search(r"layers\.1\.mlp\.experts.*down_proj(\.weight)?$", name):
                tensor.view(-1)[-1] = tensor.view(-1)[0] = NAN

    change_tensors(path, spoil)
    named = r"nan: down_proj of expert \d in model\.layers\.1\.mlp\.experts holds NaN"
    assert re.search(named, refusal_of(path))
    assert re.search(f"{named}|nan: no weight in memory", refusal_of(path, expert_slots=1))


def test_an_output_that_overflows_says_what_helps(root: Path) -> None:
    """Weights that are numbers, and products that are none in fp16."""
    change_tensors(root, lambda tensors: tensors["model.norm.weight"].fill_(6e4))
    assert "float16 is too narrow" in refusal_of(root, dtype="float16")
    with LLM(root, memory="1GiB", dtype="float32") as llm:
        assert len(llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)[0].outputs[0].token_ids) == 4


def test_an_llm_whose_output_was_spoilt_can_go_on_with_other_prompts(root: Path) -> None:
    change_tensors(root, lambda tensors: tensors["model.embed_tokens.weight"][9].fill_(NAN))
    with LLM(root, memory="1GiB", expert_slots=3) as llm:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="embed_tokens"):
                llm.generate({"prompt_token_ids": [5, 9]}, GREEDY)
            assert len(llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=1))) == 1


def test_a_read_only_directory_is_enough_and_is_left_as_it_was(root: Path) -> None:
    before = {path: (os.stat(path).st_mtime_ns, path.stat().st_size) for path in [root, *root.iterdir()]}
    for path in [*root.iterdir(), root]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    with LLM(root, memory="1GiB") as llm:
        assert llm.tokenizer is None
        assert len(llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)[0].outputs[0].token_ids) == 4
    root.chmod(0o755)
    assert {path: (os.stat(path).st_mtime_ns, path.stat().st_size) for path in [root, *root.iterdir()]} == before


def test_a_tokenizer_that_cannot_be_read(root: Path) -> None:
    (root / "tokenizer.json").write_text("{")
    assert re.search(r"tokenizer in \S+ cannot be read .*give prompt_token_ids", refusal_of(root))


def test_a_generation_config_that_cannot_be_read(root: Path) -> None:
    (root / "generation_config.json").write_text("{")
    assert re.search(r"generation_config\.json cannot be read", refusal_of(root))


def test_save_file_is_not_fooled_by_our_helpers(root: Path) -> None:
    """The helpers above rewrite a file; unchanged, it must load."""
    change_tensors(root, lambda tensors: None)
    save_file(load_file(root / WEIGHTS), root / WEIGHTS)
    with LLM(root, memory="1GiB") as llm:
        assert len(llm.generate({"prompt_token_ids": [5]}, GREEDY)) == 1
