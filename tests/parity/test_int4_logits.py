"""Experts in 4 bits: the logits are those of plain transformers with the same rounded weights, whatever is in memory.

Rounding is checked against the definition elsewhere (unit tests); here every expert of the plain model is exchanged for what
its 4-bit copy means, so that a matrix that is transposed, misplaced or padded wrongly shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import poise
from poise import LLM
from poise.engine.batch import Row
from poise.engine.sampling import SamplingParams
from poise.errors import CheckpointError
from poise.model.checkpoint import open_checkpoint
from poise.model.inspect import build_meta_model, find_experts, load_config, own_dtype
from poise.model.int4 import quantise
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.int4_reference import as_matrix
from tests.quantised_checkpoints import write_fp8, write_mxfp4

BUNDLED = Path(poise.__file__).parent / "assets" / "tiny-moe"
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02}
LENGTHS = (5, 17, 1)
NEW_TOKENS = 4
Twin = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def twin() -> Twin:
    """``twin(path)``: plain transformers' model in fp32, its experts exchanged for what 4 bits hold of them."""
    made: dict[Path, Any] = {}

    def load(path: Path, **options: Any) -> Any:
        if path not in made:
            plain = (
                transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).float().eval()
            )
            opened = open_checkpoint(path)
            config, own = load_config(opened), own_dtype(opened)
            for found in find_experts(build_meta_model(config, torch.float32), config.model_type):
                experts = plain.get_submodule(found.name)
                for param in found.params:
                    weight = getattr(experts, param)
                    if weight.dim() == 3:
                        weight.data = torch.stack(
                            [_rounded(each.to(own), experts.is_transposed) for each in weight.data]
                        )
            made[path] = plain
        return made[path]

    return load


def _rounded(weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    if is_transposed:
        return as_matrix(quantise(weight.t()).weight).t()
    return as_matrix(quantise(weight).weight)


def largest_error(llm: LLM, plain: Any, prompts: list[list[int]]) -> tuple[float, float]:
    """The largest and the median error of the logits of all new tokens, relative to the largest logit."""
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}

    def on_logits(row: Row, logits_V: torch.Tensor) -> None:
        seen[row.index].append(logits_V.float())

    results = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
        on_logits=on_logits,
    )
    errors = []
    for result in results:
        ids = [*prompts[result.index], *result.outputs[0].token_ids]
        with torch.no_grad():
            want_TV = plain(torch.tensor([ids])).logits[0, len(prompts[result.index]) - 1 : -1]
        errors.append((torch.stack(seen[result.index]) - want_TV).abs().amax(1) / want_TV.abs().max())
    return float(torch.cat(errors).max()), float(torch.cat(errors).median())


@pytest.mark.parametrize("slots", [1, None], ids=["one-slot", "all-resident"])
@pytest.mark.parametrize(
    "architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe", "jamba", "bundled"]
)
def test_logits_equal_those_of_the_rounded_model(
    architecture: str, slots: int | None, checkpoint: MakeCheckpoint, twin: Twin, draw_prompts: DrawPrompts
) -> None:
    path = BUNDLED if architecture == "bundled" else checkpoint(architecture)
    with LLM(path, memory="1GiB", dtype="float32", quantize="int4", expert_slots=slots) as llm:
        assert largest_error(llm, twin(path), draw_prompts(LENGTHS))[0] <= TOLERANCE["float32"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_so_do_logits_in_bf16(
    architecture: str, checkpoint: MakeCheckpoint, twin: Twin, draw_prompts: DrawPrompts
) -> None:
    path = checkpoint(architecture, "bfloat16")
    with LLM(path, memory="1GiB", dtype="bfloat16", quantize="int4") as llm:
        assert largest_error(llm, twin(path), draw_prompts(LENGTHS))[1] <= TOLERANCE["bfloat16"]


def test_a_store_made_for_one_dtype_serves_another(checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts) -> None:
    path = checkpoint("olmoe", "float16")
    counts: list[int] = []
    for dtype in ("bfloat16", "float32"):
        with LLM(path, memory="1GiB", dtype=dtype, quantize="int4", on_made=lambda done, _: counts.append(done)) as llm:
            llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=2))
            made = len(counts)
    assert made == len(counts), "nothing was made the second time"


@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral"])
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_published_quantised_checkpoints_can_be_rounded_too(
    architecture: str, checkpoint: MakeCheckpoint, twin: Twin, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers loads quantised checkpoints with it only")
    source, target = checkpoint(architecture, "bfloat16"), tmp_path / architecture
    path = write_fp8(source, target, block=(8, 8)) if architecture == "mixtral" else write_mxfp4(source, target)
    method = transformers.FineGrainedFP8Config if architecture == "mixtral" else transformers.Mxfp4Config
    plain = twin(path, quantization_config=method(dequantize=True))
    with LLM(path, memory="1GiB", dtype="float32", quantize="int4", expert_slots=2) as llm:
        assert largest_error(llm, plain, draw_prompts(LENGTHS))[0] <= TOLERANCE["float32"]


def test_reads_and_slots_take_the_small_bytes(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral", "bfloat16", hidden_size=512, intermediate_size=512)
    facts = []
    for quantize in ("none", "int4"):
        with LLM(path, memory="1GiB", dtype="bfloat16", quantize=quantize, expert_slots=1) as llm:
            llm.generate({"prompt_token_ids": [5, 6, 7, 8]}, SamplingParams(max_tokens=4, ignore_eos=True))
            progress = llm.last_progress
            assert progress is not None
            facts.append((progress.bytes_read / llm._open().counters.reads, llm.describe()))
    (plain_read, plain), (read, small) = facts
    assert plain_read / read == pytest.approx(16 / 4.5, rel=0.02)
    assert int(str(plain["expert_bytes"])) / int(str(small["expert_bytes"])) == pytest.approx(16 / 4.5)
    assert small["quantize"] == "int4"
    assert 0.05 < float(str(small["int4_weight_error"])) < 0.1


def test_experts_with_an_arithmetic_of_their_own_are_refused(tmp_path: Path) -> None:
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=1, vocab_size=128, max_seq_len=64, ffn_config={"ffn_hidden_size": 64, "moe_top_k": 1},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )  # fmt: skip
    transformers.DbrxForCausalLM(config).save_pretrained(tmp_path / "dbrx")
    with pytest.raises(CheckpointError, match="quantize 'int4' is not supported for DbrxExpertGLU"):
        LLM(tmp_path / "dbrx", memory="1GiB", quantize="int4")
