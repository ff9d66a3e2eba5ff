"""What can be wrong with a directory, a budget or a prompt: one line says what, and nothing is left running."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poise import LLM, SamplingParams
from poise.engine.request import Prompt
from poise.errors import BudgetError, CheckpointError, PromptError, UsageError
from tests.conftest import MakeCheckpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
Damage = Callable[[Path], object]


def configure(**values: Any) -> Damage:
    """Changes config.json."""

    def damage(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(config | values))

    return damage


def put(**tensors: torch.Tensor | None) -> Damage:
    """Replaces tensors (dots written as two underscores), or takes them away."""

    def damage(root: Path) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in (load_file(root / WEIGHTS) | named).items() if tensor is not None}
        save_file(kept, root / WEIGHTS)

    return damage


def rewrite_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the JSON header of the weights' file and leaves the data as it is."""

    def damage(root: Path) -> None:
        content = (root / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        written = json.dumps(header).encode()
        (root / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])

    return damage


def write(name: str, content: bytes) -> Damage:
    """Puts a file in place."""
    return lambda root: (root / name).write_bytes(content)


def remove(name: str) -> Damage:
    """Takes a file away."""
    return lambda root: (root / name).unlink()


def cut(nbytes: int) -> Damage:
    """Takes the last bytes of the weights away."""
    return lambda root: os.truncate(root / WEIGHTS, (root / WEIGHTS).stat().st_size - nbytes)


def name_a_missing_shard(root: Path) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = list(load_file(root / WEIGHTS))
    (root / WEIGHTS).rename(root / shards[0])
    write_index(root, {name: shards[name == names[0]] for name in names})


def write_index(root: Path, weight_map: Mapping[str, Any]) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickle_instead(root: Path) -> None:
    (root / WEIGHTS).unlink()
    torch.save({}, root / "pytorch_model.bin")


def twice(root: Path) -> None:
    shutil.copy(root / WEIGHTS, root / "b.safetensors")
    (root / WEIGHTS).rename(root / "a.safetensors")


def damaged_entry(**values: Any) -> Damage:
    """Changes what the header says about one tensor."""
    return rewrite_header(lambda header: header["lm_head.weight"].update(values))


CASES = {
    "no config": (remove("config.json"), r"config\.json is missing"),
    "config is not JSON": (write("config.json", b'{"model_type": '), r"config\.json cannot be read as JSON"),
    "config is not text": (write("config.json", b"\xff\xfe\x00"), r"config\.json cannot be read as JSON"),
    "config is a list": (write("config.json", b"[]"), r"config\.json holds a JSON list"),
    "config without a type": (write("config.json", b"{}"), r"config\.json is not one that transformers knows"),
    "unknown type": (configure(model_type="mixtrol"), r"config\.json is not one .*mixtrol"),
    "a type without experts": (configure(model_type="llama"), r"'llama' has no experts"),
    "a type that is no causal model": (configure(model_type="t5"), r"'t5' is no causal language model"),
    "quantised": (configure(quantization_config={"quant_method": "fp8"}), r"quantization_config 'fp8'"),
    "file cut short": (cut(10), r"model\.safetensors is truncated: tensor \S+ ends 10 bytes past its end"),
    "file cut to nothing": (write(WEIGHTS, b""), r"model\.safetensors is not a whole safetensors file"),
    "file of something else": (write(WEIGHTS, b"\xff" * 100), r"model\.safetensors is not a whole safetensors file"),
    "header is not JSON": (
        write(WEIGHTS, (20).to_bytes(8, "little") + b"x" * 200),
        r"model\.safetensors .* header is not JSON",
    ),
    "entry without a shape": (
        rewrite_header(lambda header: header["lm_head.weight"].pop("shape") and None),
        r"lm_head",
    ),
    "entry of another size": (damaged_entry(data_offsets=[0, 8]), r"model\.safetensors .* tensor lm_head\.weight"),
    "entry of unknown dtype": (damaged_entry(dtype="F13"), r"model\.safetensors .* tensor lm_head\.weight"),
    "index is not JSON": (write(INDEX, b"{"), r"index\.json cannot be read as JSON"),
    "index without a map": (write(INDEX, b"{}"), r"index\.json has no weight_map"),
    "index names a missing shard": (name_a_missing_shard, r"shard model-00002-of-00002\.safetensors .* is missing"),
    "pickled weights only": (pickle_instead, r"pickled weights only"),
    "no weights": (remove(WEIGHTS), r"holds no \*\.safetensors file"),
    "a tensor twice": (twice, r"is in a\.safetensors and in b\.safetensors"),
    "weights are a folder": (
        lambda root: (remove(WEIGHTS)(root), (root / WEIGHTS).mkdir()),
        r"model\.safetensors cannot be read",
    ),
    "dense tensor missing": (put(model__norm__weight=None), r"lacks tensor model\.norm\.weight"),
    "router missing": (put(model__layers__0__mlp__gate__weight=None), r"lacks tensor .*layers\.0\.mlp\.gate\.weight"),
    "expert tensor missing": (put(**{EXPERT: None}), r"layers\.1\.mlp\.experts.* 7 experts on disk, 8 in config"),
    "expert of another shape": (put(**{EXPERT: torch.zeros(16, 64)}), r"experts\.3\.up_proj\.weight \[16, 64\]"),
    "expert transposed": (put(**{EXPERT: torch.zeros(64, 32)}), r"experts\.3\.up_proj\.weight \[64, 32\]"),
    "more experts in config": (configure(num_local_experts=12), r"8 experts on disk, 12 in config"),
    "fewer experts in config": (configure(num_local_experts=6), r"8 experts on disk, 6 in config"),
    "dense tensor of another shape": (put(model__layers__0__self_attn__q_proj__weight=torch.zeros(16, 64)), r"q_proj"),
    "expert is int8": (put(**{EXPERT: torch.ones(32, 64).to(torch.int8)}), r"experts\.3\.up_proj\.weight is I8"),
    "dense tensor is int8": (put(lm_head__weight=torch.ones(128, 64).to(torch.int8)), r"lm_head\.weight is I8"),
    "expert is scaled fp8 undeclared": (
        put(**{EXPERT: torch.ones(32, 64).to(torch.float8_e4m3fn)}),
        r"experts\.3\.up_proj\.weight is F8_E4M3, .* without a quantization_config",
    ),
    "expert is a scalar": (put(**{EXPERT: torch.zeros(())}), r"experts\.3\.up_proj"),
    "header is a list": (rewrite_header(lambda header: [header]), r"model\.safetensors"),
    "entry with offsets of text": (damaged_entry(data_offsets=["a", "b"]), r"model\.safetensors"),
    "index names a number": (lambda root: write_index(root, {"lm_head.weight": 3}), r"index\.json"),
    "tokenizer is not JSON": (write("tokenizer.json", b"{"), r"tokenizer"),
    "more layers in config": (configure(num_hidden_layers=3), r"nothing for model\.layers\.2\.mlp\.experts"),
    "more chosen than there are experts": (
        configure(num_experts_per_tok=64),
        r"num_experts_per_tok in config\.json is 64; the model has 8 experts in a layer: it must be 1 to 8",
    ),
    "no expert chosen": (configure(num_experts_per_tok=0), r"num_experts_per_tok in config\.json is 0; .* 1 to 8"),
    "end token is text": (
        write("generation_config.json", b'{"eos_token_id": "x"}'),
        r"generation_config\.json has eos_token_id 'x'; it must be a token id",
    ),
    "end tokens are text": (
        write("generation_config.json", b'{"eos_token_id": [2, "x"]}'),
        r"generation_config\.json has eos_token_id \[2, 'x'\]; it must be a token id",
    ),
    "end token is a fraction": (configure(eos_token_id=2.5), r"config\.json"),
    "end token is an object": (write("generation_config.json", b'{"eos_token_id": {"a": 1}}'), r"eos_token_id"),
    "a value of the wrong type in config": (configure(hidden_size="x"), r"hidden_size"),
    "a value that cannot be in config": (configure(hidden_size=-64), r"config\.json"),
}


@pytest.fixture
def root(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of its own for every test."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def refusal_of(path: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(CheckpointError) as refusal:
        LLM(path, memory="1GiB")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(("damage", "pattern"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_a_damaged_directory_is_refused_in_one_line_that_names_what_is_wrong(
    damage: Damage, pattern: str, root: Path
) -> None:
    damage(root)
    assert re.search(pattern, refusal_of(root))


def test_a_directory_that_is_refused_late_leaves_no_thread_running(root: Path) -> None:
    write("generation_config.json", b"{")(root)
    assert "generation_config.json" in refusal_of(root)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("poise-reader")]


def test_a_path_that_is_not_there_or_no_directory_is_refused_by_name(root: Path) -> None:
    assert f"no such model directory: {root / 'nowhere'}" in refusal_of(root / "nowhere")
    assert f"{root / 'config.json'} is a file" in refusal_of(root / "config.json")


def test_a_dense_model_is_refused_by_its_type(checkpoint: MakeCheckpoint) -> None:
    assert "'llama' has no experts" in refusal_of(checkpoint("llama"))


def test_the_first_refusal_of_a_budget_names_one_that_works(root: Path) -> None:
    """Before anything is loaded; it is enough for a short prompt and the answer that is given to it unasked."""
    with pytest.raises(BudgetError) as refusal:
        LLM(root, memory=1)
    assert str(refusal.value.smallest_bytes) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with LLM(root, memory=refusal.value.smallest_bytes) as llm:
        assert len(llm.generate({"prompt_token_ids": [5] * 64}, SamplingParams(ignore_eos=True))) == 1


def test_of_a_budget_for_known_prompts_the_first_refusal_names_the_smallest_that_works(root: Path) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompts: list[Prompt] = [{"prompt_token_ids": [5] * length} for length in (3, 200, 7)]
    expected = [(prompt, params) for prompt in prompts]
    with pytest.raises(BudgetError) as refusal:
        LLM(root, memory=1, expected=expected)
    smallest = refusal.value.smallest_bytes
    with LLM(root, memory=smallest, expected=expected) as llm:
        assert [len(each.outputs[0].token_ids) for each in llm.generate(prompts, params)] == [50, 50, 50]
    with pytest.raises(BudgetError) as again:
        LLM(root, memory=smallest - 1, expected=expected)
    assert again.value.smallest_bytes == smallest
    with LLM(root, memory=smallest - 1) as llm:
        with pytest.raises(BudgetError) as late:
            llm.generate(prompts, params)
        assert late.value.smallest_bytes == smallest
        assert len(llm.generate(prompts[0], params)) == 1


def test_what_is_wrong_with_a_known_prompt_is_said_before_weights_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poise.engine.llm.load_resident", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(PromptError, match="prompt 1: it has token id 128"):
        LLM(root, memory="1GiB", expected=[({"prompt_token_ids": [ids]}, SamplingParams()) for ids in (5, 128)])


@pytest.mark.parametrize("token", [-1, 128])
def test_an_end_token_outside_the_vocabulary_pads_nothing(token: int, root: Path) -> None:
    write("generation_config.json", json.dumps({"eos_token_id": [token]}).encode())(root)
    with LLM(root, memory="1GiB") as llm:
        prompts: list[Prompt] = [{"prompt_token_ids": [5]}, {"prompt_token_ids": [5, 6, 7]}]
        assert len(llm.generate(prompts, SamplingParams(max_tokens=2))) == 2


@pytest.mark.parametrize("shown", [True, False])
def test_transformers_progress_bars_are_left_as_the_user_has_them(shown: bool, root: Path) -> None:
    try:
        (transformers.logging.enable_progress_bar if shown else transformers.logging.disable_progress_bar)()
        LLM(root, memory="1GiB").close()
        assert transformers.logging.is_progress_bar_enabled() == shown
    finally:
        transformers.logging.disable_progress_bar()


def test_a_closed_llm_says_so_and_may_be_closed_again(root: Path) -> None:
    llm = LLM(root, memory="1GiB")
    llm.close()
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.generate({"prompt_token_ids": [5]})


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"quantize": "int3"}, "quantize 'int3' is not supported; choose one of none, int4"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"expert_slots": 0}, "expert_slots is 0"),
        ({"memory": "lots"}, "memory size 'lots'"),
        ({"memory": 0}, "must be positive"),
        ({"memory": 1.5e9}, "memory size 1500000000.0 is neither"),
        ({"memory": None}, "memory size None is neither"),
        ({"memory": True}, "memory size True is neither"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_value(option: dict[str, Any], pattern: str, root: Path) -> None:
    with pytest.raises(UsageError, match=pattern):
        LLM(root, **{"memory": "1GiB", **option})
