"""Every mixture-of-experts class that transformers' registry of causal language models names runs exactly, or is refused.

No class is named here but those that are refused, wrapped or batched otherwise: a class that a new transformers brings is
tested by being there. One that transformers itself cannot run from a tiny configuration is skipped with its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poise import LLM
from poise.errors import CheckpointError
from poise.model.cache import make_cache, needs_equal_rows, needs_whole_prompts
from poise.model.checkpoint import open_checkpoint
from poise.model.inspect import load_config
from tests.parity.registry_configs import CORRECTIONS, EXPERTS, model_types
from tests.parity.registry_runs import (
    LENGTHS,
    NEW_TOKENS,
    SLOTS,
    Outcome,
    errors,
    plain_last_logits,
    plain_model,
    plain_runs,
    poise_runs,
    prompts,
    sure_tokens,
    try_class,
)
from tests.parity.registry_table import DOCUMENT, TOLERANCE, document, line, remark

REFUSED = {"doge": "DogeCDMoE", "jetmoe": "JetMoeMoE"}
"""Model types whose experts neither go through the registry nor have a wrapper, and the class that the refusal names."""
if transformers.__version__.startswith("5.17."):
    REFUSED["aria_text"] = "AriaExperts"
WRAPPED = ["dbrx", "llama4_text", "longcat_flash"]
EQUAL_ROWS = ["deepseek_v4", "minimax", "minimax_m3_vl_text"]
WHOLE_PROMPTS = ["jamba", "minimax"]
NOT_ASKED_EARLY = {"deepseek_v4": 2, "gemma4_text": 4, "zaya": 3}
"""Layers of the tiny configuration whose routers look at more than the hidden states that their experts get: at token ids, at
other hidden states, at a state that goes from router to router."""
BF16_TOLERANCE = 0.01
"""Of the median position, as in test_parity."""

TryClass = Callable[[str], tuple[Outcome, Path]]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> TryClass:
    """``tried("mixtral")``: its outcome and its checkpoint, made once."""
    made: dict[str, tuple[Outcome, Path]] = {}

    def run(model_type: str) -> tuple[Outcome, Path]:
        if model_type not in made:
            path = tmp_path_factory.mktemp(model_type)
            made[model_type] = try_class(model_type, path), path
        return made[model_type]

    return run


@pytest.mark.parametrize("model_type", model_types())
def test_a_class_of_the_registry_equals_plain_transformers_or_is_refused(
    model_type: str, tried: TryClass, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, _ = tried(model_type)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("poise")]
    if outcome.kind == "not run by transformers":
        pytest.skip(f"transformers itself cannot run {model_type}: {outcome.line}")
    if outcome.kind == "refused":
        assert outcome.line == (
            f"model type '{model_type}' keeps its experts ({REFUSED.get(model_type)}) outside transformers' registry of "
            "experts functions; not supported: choose one that docs/models.md lists as exact"
        )
        return
    assert model_type not in REFUSED
    assert max(errors(outcome.ours, outcome.plain)) <= TOLERANCE
    for run, want in zip(outcome.ours, outcome.plain, strict=True):
        assert run.new_ids[: len(sure_tokens(want))] == sure_tokens(want)
    assert sum(len(sure_tokens(want)) for want in outcome.plain) > 0.8 * sum(NEW_TOKENS), (
        "it hardly ever chooses clearly"
    )
    assert outcome.num_experts >= EXPERTS > 2 * SLOTS
    assert outcome.misses >= outcome.num_experts - SLOTS, "the experts were not streamed"


@pytest.mark.parametrize("model_type", model_types())
def test_routers_taken_out_choose_what_the_model_chooses_or_are_known_not_to(model_type: str, tried: TryClass) -> None:
    outcome, path = tried(model_type)
    if outcome.kind != "runs":
        pytest.skip(outcome.line)
    kind = load_config(open_checkpoint(path)).get_text_config().model_type
    assert outcome.not_asked_early == NOT_ASKED_EARLY.get(kind, 0)
    assert outcome.routers_agree


@pytest.mark.parametrize("model_type", model_types())
def test_the_document_tells_the_outcome(model_type: str, tried: TryClass) -> None:
    _skip_unless_of_this_version()
    outcome, path = tried(model_type)
    written = DOCUMENT.read_text().splitlines()
    remedy = "run python -m tests.parity.registry_table"
    assert line(outcome, path) in written, remedy
    assert not outcome.line or remark(outcome) in written, remedy


def test_the_document_lists_and_counts_every_class_of_the_registry() -> None:
    _skip_unless_of_this_version()
    text = DOCUMENT.read_text()
    lines = [each for each in text.splitlines() if each.startswith("| `")]
    remarks = [each for each in text.splitlines() if each.startswith("- `")]
    assert [each.split("`")[1] for each in lines] == model_types()
    assert text == document(lines, remarks)


def _skip_unless_of_this_version() -> None:
    if f"transformers {transformers.__version__};" not in DOCUMENT.read_text():
        pytest.skip(f"docs/models.md was made with another transformers than {transformers.__version__}")


def test_corrections_are_of_classes_that_are_there() -> None:
    _skip_unless_of_this_version()
    assert set(CORRECTIONS) | set(REFUSED) | {*WRAPPED, *EQUAL_ROWS, *WHOLE_PROMPTS} <= set(model_types())


@pytest.mark.parametrize("model_type", EQUAL_ROWS)
def test_rows_of_equal_length_are_asked_for_where_transformers_itself_errs_under_padding(
    model_type: str, tried: TryClass
) -> None:
    model = plain_model(tried(model_type)[1])
    assert needs_equal_rows(model)
    long, short = (prompts()[LENGTHS.index(length)] for length in (29, 17))
    alone = plain_last_logits(model, [short], [16, 1])
    padded = _last_logits_or_nan(model, [long, short], [28, 1])[-1]
    assert not (padded - alone).abs().max() <= 1e-2 * alone.abs().max()


@pytest.mark.parametrize("model_type", WHOLE_PROMPTS)
def test_whole_prompts_are_asked_for_where_transformers_itself_errs_in_chunks(model_type: str, tried: TryClass) -> None:
    model = plain_model(tried(model_type)[1])
    assert needs_whole_prompts(model)
    prompt = prompts()[LENGTHS.index(17)]
    whole = plain_last_logits(model, [prompt], [17])
    cut = _last_logits_or_nan(model, [prompt], [8, 9])
    assert not (cut - whole).abs().max() <= 1e-2 * whole.abs().max()


def _last_logits_or_nan(model: torch.nn.Module, rows: list[list[int]], widths: list[int]) -> torch.Tensor:
    """Some classes raise where others err."""
    try:
        return plain_last_logits(model, rows, widths)
    except RuntimeError:
        return torch.full((len(rows), 1), math.nan)


@pytest.mark.parametrize("model_type", WRAPPED)
def test_wrapped_experts_in_bf16_are_as_close_as_rounding_allows(model_type: str, tried: TryClass) -> None:
    """From an fp32 checkpoint: every expert is converted on its way into its slot."""
    path = tried(model_type)[1]
    with LLM(path, memory="1GiB", expert_slots=SLOTS, dtype="bfloat16") as llm:
        ours = poise_runs(llm)
    found = torch.tensor(errors(ours, plain_runs(plain_model(path, torch.bfloat16))))
    assert found.median() <= BF16_TOLERANCE


def test_published_longcat_checkpoints_hold_nothing_for_experts_without_weights(
    tried: TryClass, tmp_path: Path
) -> None:
    """transformers saves unused gates for them; Meituan's files have none."""
    outcome, path = tried("longcat_flash")
    tensors = load_file(path / "model.safetensors")
    idle = [f".experts.{expert}." for expert in range(EXPERTS, EXPERTS + 4)]
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in idle)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with LLM(tmp_path, memory="1GiB", expert_slots=SLOTS) as llm:
        assert max(errors(poise_runs(llm), outcome.plain)) <= TOLERANCE


def test_a_class_whose_cache_cannot_be_made_from_outside_is_refused() -> None:
    config = transformers.XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=1, d_inner=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match="'xlnet' generates with a cache of its own that Poise cannot make"):
        make_cache(model)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_a_bf16_checkpoint_runs_as_close_as_rounding_allows(model_type: str, tried: TryClass, tmp_path: Path) -> None:
    outcome, path = tried(model_type)
    if outcome.kind != "runs":
        pytest.skip(outcome.line)
    plain = plain_model(path, torch.bfloat16)
    plain.save_pretrained(tmp_path)
    with LLM(tmp_path, memory="1GiB", expert_slots=SLOTS) as llm:
        found = torch.tensor(errors(poise_runs(llm), plain_runs(plain)))
    assert found.median() <= 2 * BF16_TOLERANCE
