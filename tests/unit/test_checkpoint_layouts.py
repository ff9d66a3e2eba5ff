"""The same model in every layout that checkpoints come in: each gives what plain transformers gives.

Which experts' layouts there are (per expert, fused, transposed, with biases, gate and up interleaved) comes with the
architectures; how the files are cut, named and laid out is varied here on top.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poise import LLM, SamplingParams
from tests.conftest import MakeCheckpoint, Reference, tiny_config, write_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROMPT = [5, 77, 31, 6, 100, 9, 9]
NEW_TOKENS = 5
TOLERANCE = 1e-5
Rewrite = Callable[[Path], object]

ON_DISK = {
    "mixtral": {"experts.3.w1.weight": 2},
    "qwen3_moe": {"experts.7.gate_proj.weight": 2},
    "granitemoe": {"input_linear.weight": 3},
    "gpt_oss": {"experts.gate_up_proj": 3, "experts.gate_up_proj_bias": 2},
    "deepseek_v3": {"shared_experts.gate_proj.weight": 2, "layers.0.mlp.gate_proj.weight": 2},
}
"""By architecture, what makes its layout: ends of tensor names and their dimensions.

Per expert (two namings); fused; fused, transposed, with biases, gate and up interleaved; shared experts and a dense layer.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "model"


def assert_equal_to_plain(path: Path, plain: object, **options: object) -> None:
    """Logits of a prompt and a few generated tokens against the plain model over the same tokens."""
    seen: list[torch.Tensor] = []
    with LLM(path, memory="1GiB", expert_slots=2, **options) as llm:  # type: ignore[arg-type]
        result = llm.generate(
            {"prompt_token_ids": PROMPT},
            SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
            on_logits=lambda row, logits_V: seen.append(logits_V.float()),
        )[0]
    ids = torch.tensor([[*PROMPT, *result.outputs[0].token_ids]])
    with torch.no_grad():
        want_TV = plain(ids).logits[0, len(PROMPT) - 1 : -1].float()  # type: ignore[operator]
    assert (torch.stack(seen) - want_TV).abs().max() <= TOLERANCE * want_TV.abs().max()


@pytest.mark.parametrize("architecture", ON_DISK)
def test_the_fixtures_have_the_layouts_they_stand_for(architecture: str, checkpoint: MakeCheckpoint) -> None:
    tensors = load_file(checkpoint(architecture) / WEIGHTS)
    for end, dimensions in ON_DISK[architecture].items():
        assert [tensor.dim() for name, tensor in tensors.items() if name.endswith(end)][:1] == [dimensions], end


@pytest.mark.parametrize("architecture", ON_DISK)
@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no-index"])
def test_sharded_files_with_and_without_an_index(
    architecture: str, with_index: bool, checkpoint: MakeCheckpoint, reference: Reference, root: Path
) -> None:
    """Shards so small that an expert's tensors lie in several of them."""
    plain = reference(checkpoint(architecture))
    plain.save_pretrained(root, max_shard_size="20KB")
    assert len(list(root.glob("model-*-of-*.safetensors"))) > 4
    if not with_index:
        (root / INDEX).unlink()
    assert_equal_to_plain(root, plain)


def into_one_shard_per_kind(path: Path) -> None:
    """Gates in one file, ups in another, and an index that says so."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(name.split(".")[-2] if name.count(".") else name, {})[name] = tensor
    for kind, members in kinds.items():
        save_file(members, path / f"{kind}.safetensors")
    weight_map = {name: f"{kind}.safetensors" for kind, members in kinds.items() for name in members}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def begin_at_an_odd_byte(path: Path) -> None:
    """A header of odd length: every tensor begins where no number may begin in memory."""
    content = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * (1 + length % 2)
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2


def in_another_order(path: Path) -> None:
    """Tensors of an expert far apart in the file, ups before gates."""
    tensors = load_file(path / WEIGHTS)
    header, data, offset = {}, [], 0
    for name in sorted(tensors, key=lambda name: (name.split(".")[-2], name), reverse=True):
        raw = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + len(raw)]}
        data.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def without_the_model_prefix(path: Path) -> None:
    """``layers.0`` instead of ``model.layers.0``, as checkpoints of the bare model have it."""
    tensors = load_file(path / WEIGHTS)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path / WEIGHTS)


def with_tensors_that_no_one_needs(path: Path) -> None:
    """Prediction layers, rotary buffers: published checkpoints are full of them."""
    tensors = load_file(path / WEIGHTS)
    extra = {
        name.replace("layers.1.", "layers.9."): tensor.clone() for name, tensor in tensors.items() if ".1." in name
    }
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra | rotary, path / WEIGHTS)


def made_of_links(path: Path) -> None:
    """Every file a link to a blob of another name, as the hub's cache has it; and the directory a link too."""
    blobs, real = path.parent / "blobs", path.parent / "real"
    blobs.mkdir()
    path.rename(real)
    for number, file in enumerate(sorted(real.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(Path("..") / "blobs" / f"{number:064x}")
    path.symlink_to(real)


def under_another_name(path: Path) -> None:
    """One file, no index, a name of its own."""
    (path / WEIGHTS).rename(path / "weights.safetensors")


@pytest.mark.parametrize(
    "rewrite",
    [
        into_one_shard_per_kind,
        begin_at_an_odd_byte,
        in_another_order,
        without_the_model_prefix,
        with_tensors_that_no_one_needs,
        made_of_links,
        under_another_name,
    ],
)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_files_in_another_shape(
    architecture: str, rewrite: Rewrite, checkpoint: MakeCheckpoint, reference: Reference, root: Path
) -> None:
    source = checkpoint(architecture)
    shutil.copytree(source, root)
    rewrite(root)
    assert_equal_to_plain(root, reference(source))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_stacked_as_the_model_has_them(
    architecture: str, checkpoint: MakeCheckpoint, reference: Reference, root: Path
) -> None:
    """``experts.gate_up_proj`` (experts, 2 x inner, hidden): what a save of the state dict writes."""
    source = checkpoint(architecture)
    shutil.copytree(source, root)
    save_file({name: tensor.clone() for name, tensor in reference(source).state_dict().items()}, root / WEIGHTS)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(root / WEIGHTS))
    assert_equal_to_plain(root, reference(source))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_tied_embeddings_need_no_output_tensor(architecture: str, root: Path) -> None:
    write_checkpoint(root, tiny_config(architecture, tie_word_embeddings=True), torch.float32)
    assert "lm_head.weight" not in load_file(root / WEIGHTS)
    assert_equal_to_plain(root, transformers.AutoModelForCausalLM.from_pretrained(root).eval())


def test_a_shared_expert_with_a_gate_and_layers_without_experts(root: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 2],
        initializer_range=0.1,
    )
    write_checkpoint(root, config, torch.float32)
    assert_equal_to_plain(root, transformers.AutoModelForCausalLM.from_pretrained(root).eval())


@pytest.mark.parametrize("dtypes", [("router", torch.float32), ("experts", torch.float32), ("norm", torch.float16)])
def test_tensors_of_several_dtypes(dtypes: tuple[str, torch.dtype], checkpoint: MakeCheckpoint, root: Path) -> None:
    """A bf16 checkpoint with some tensors wider or other: each is brought to the dtype that the model runs in."""
    part, dtype = dtypes
    shutil.copytree(checkpoint("gpt_oss", "bfloat16"), root)
    tensors = load_file(root / WEIGHTS)
    save_file({name: each.to(dtype) if part in name else each for name, each in tensors.items()}, root / WEIGHTS)
    plain = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    assert_equal_to_plain(root, plain, dtype="float32")
