"""Published quantised layouts: what Poise streams and dequantises equals what transformers dequantises when it loads.

Weights are compared bit for bit, dense and experts alike; logits with the plain model's, by teacher forcing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from poise import LLM, SamplingParams
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.quantised_checkpoints import write_fp8, write_mxfp4, write_plain_twin_of_fp8

BLOCK = (8, 8)
"""Divides every side in the tiny models; a published one is 128 by 128."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
LENGTHS = (5, 17, 1)
NEW_TOKENS = 6
Published = Callable[[str], Path]

FP8 = {
    "qwen3_moe": {"block": BLOCK, "scale_dtype": torch.bfloat16},
    "deepseek_v3": {"block": BLOCK},
    "mixtral": {"block": (128, 128)},
}
"""Per expert with a router, shared experts beside, and another naming; scales as Qwen3 (bf16) and DeepSeek (fp32) have them."""


@pytest.fixture(scope="module")
def published(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """``published("deepseek_v3")``: a checkpoint in the layout in which such a model is published, made once."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            target = tmp_path_factory.mktemp("published") / architecture
            source = checkpoint(architecture, "bfloat16")
            options: dict[str, Any] = FP8.get(architecture, {})
            made[architecture] = write_fp8(source, target, **options) if options else write_mxfp4(source, target)
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def dequantised_by_transformers() -> Callable[[Path, str], Any]:
    """The model as transformers loads it with ``dequantize=True``."""
    pytest.importorskip("accelerate", reason="transformers loads quantised checkpoints with it only")
    loaded: dict[tuple[Path, str], Any] = {}

    def load(path: Path, dtype: str) -> Any:
        if (path, dtype) not in loaded:
            is_mxfp4 = path.name == "gpt_oss"
            method = transformers.Mxfp4Config if is_mxfp4 else transformers.FineGrainedFP8Config
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), quantization_config=method(dequantize=True)
            )
            loaded[path, dtype] = model.to(getattr(torch, dtype)).eval()
        return loaded[path, dtype]

    return load


ARCHITECTURES = [*FP8, "gpt_oss"]
pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_weights_equal_those_of_transformers_bit_for_bit(
    architecture: str, dtype: str, published: Published, dequantised_by_transformers: Callable[[Path, str], Any]
) -> None:
    path = published(architecture)
    plain = dequantised_by_transformers(path, dtype)
    with LLM(path, memory="1GiB", dtype=dtype) as llm:
        dense = dict(llm._blueprint.model.named_parameters())
        assert dense
        for name, weight in dense.items():
            want = plain.get_parameter(name)
            assert weight.dtype == want.dtype, name
            assert torch.equal(weight, want), name
        store = llm._open()
        store.resize(1)
        for layer, row in enumerate(store._supplier._sources_LE):
            experts = plain.get_submodule(row[0].module)
            for source in row:
                store.request(layer, [source.expert])
                expert, weights = store.take()
                for name, parts in weights.items():
                    assert torch.equal(torch.cat(parts), getattr(experts, name)[expert]), (source.module, name, expert)
                store.release(expert)


@pytest.mark.parametrize("slots", [1, 3, None], ids=["one-slot", "three-slots", "all-resident"])
@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((name, "float32") for name in ARCHITECTURES), ("gpt_oss", "bfloat16")]
)
def test_logits_equal_those_of_transformers(
    architecture: str,
    dtype: str,
    slots: int | None,
    published: Published,
    dequantised_by_transformers: Callable[[Path, str], Any],
    draw_prompts: DrawPrompts,
) -> None:
    path = published(architecture)
    plain = dequantised_by_transformers(path, dtype)
    prompts = draw_prompts(LENGTHS)
    for ids, new_ids, logits_TV in run(path, prompts, slots=slots, dtype=dtype):
        with torch.no_grad():
            want_TV = plain(torch.tensor([ids + new_ids])).logits[0, len(ids) - 1 : -1].float()
        error_T = (logits_TV - want_TV).abs().amax(1) / want_TV.abs().max()
        if dtype == "float32":
            assert error_T.max() <= TOLERANCE[dtype]
        else:
            assert error_T.median() <= TOLERANCE[dtype]


def run(
    path: Path, prompts: list[list[int]], *, slots: int | None, **options: Any
) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Prompt, new tokens and the logits that chose them, for every prompt."""
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    with LLM(path, memory="1GiB", expert_slots=slots, **options) as llm:
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V.float()),
        )
    return [
        (prompts[result.index], list(result.outputs[0].token_ids), torch.stack(seen[result.index]))
        for result in results
    ]


@pytest.mark.parametrize(("architecture", "least"), [("gpt_oss", 3.3), ("mixtral", 1.9)])
def test_an_expert_takes_the_disk_s_bytes_to_read_and_to_keep(
    architecture: str, least: float, published: Published, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """About 4.25 bits a weight for MXFP4 and 8 for fp8, against 16: that is what a read costs and what a slot holds."""
    source = checkpoint(architecture, "bfloat16", hidden_size=512, intermediate_size=512, head_dim=16)
    target = tmp_path / architecture
    path = write_fp8(source, target) if architecture in FP8 else write_mxfp4(source, target)
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    facts = []
    for each in (source, path):
        with LLM(each, memory="1GiB", expert_slots=1) as llm:
            llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
            progress = llm.last_progress
            assert progress is not None
            facts.append(
                (
                    progress.bytes_read / llm._open().counters.reads,
                    llm._blueprint.pipeline.slot_bytes,
                    llm._blueprint.pipeline.scratch_bytes,
                )
            )
    (plain_read, plain_slot, plain_scratch), (read, slot, scratch) = facts
    assert plain_read / read >= least * 0.9, "whole pages are read"
    assert plain_slot / slot >= least * 0.9
    assert scratch - plain_scratch >= plain_slot * 0.9, "one expert's weights, counted in the budget"


def test_blocks_that_do_not_divide_a_matrix_are_read_as_the_format_says(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    """DeepSeek-V3 itself has such matrices; transformers does not dequantise them, so the plain twin is the reference."""
    block = (20, 20)
    path = write_fp8(checkpoint("deepseek_v3", "bfloat16"), tmp_path / "fp8", block=block)
    twin = write_plain_twin_of_fp8(path, tmp_path / "plain", block, torch.float32)
    prompts = draw_prompts(LENGTHS)
    for (*ids, logits_TV), (*want_ids, want_TV) in zip(
        run(path, prompts, slots=2, dtype="float32"), run(twin, prompts, slots=2), strict=True
    ):
        assert ids == want_ids
        assert (logits_TV - want_TV).abs().max() <= TOLERANCE["float32"] * want_TV.abs().max()


def test_what_a_checkpoint_leaves_unquantised_is_taken_as_it_is(published: Published) -> None:
    """``modules_to_not_convert``: embeddings, norms, routers, the output; they have no scales and are plain tensors."""
    path = published("qwen3_moe")
    tensors = load_file(path / "model.safetensors")
    left = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and "scale" not in name}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} <= left
    with LLM(path, memory="1GiB") as llm:
        for name in left:
            assert torch.equal(llm._blueprint.model.get_parameter(name), tensors[name])
