"""What Poise leans on inside transformers, by name: when an upgrade takes one away, this says which part of Poise it held up.

Most of these are not public. The range of versions in pyproject.toml is the range in which this file passes.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from tests.conftest import CONFIGS, tiny_config

MODEL = "modeling_utils.PreTrainedModel"
LEANS_ON = [
    ("integrations.moe.ALL_EXPERTS_FUNCTIONS.register", ("key", "value"), "the seam registers its experts function"),
    (
        f"{MODEL}.set_experts_implementation",
        ("experts_implementation",),
        "the seam turns a model's experts over to itself",
    ),
    (f"{MODEL}._get_dtype_plan", ("dtype",), "dense loading keeps the parameters that must stay fp32"),
    (f"{MODEL}._load_pretrained_model", ("model", "state_dict", "checkpoint_files", "load_config"), "dense loading"),
    (
        f"{MODEL}._finalize_model_loading",
        ("model", "load_config", "loading_info"),
        "dense loading fills buffers, ties weights",
    ),
    ("conversion_mapping.get_model_conversion_mapping", ("model",), "the layout finds the experts' tensors on disk"),
    (
        "core_model_loading.rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
        "the layout maps a tensor on disk to a parameter",
    ),
    ("core_model_loading.WeightConverter.convert", ("layer_name", "model", "config"), "an expert is converted alone"),
    ("core_model_loading.dot_natural_key", (), "the layout sorts experts by number"),
    ("cache_utils.DynamicCache", ("config",), "a batch makes its cache from the model's configuration"),
    ("cache_utils.Cache.reorder_cache", ("beam_idx",), "finished rows leave a batch"),
]
"""(where, parameters it must take, what Poise does with it)."""


@pytest.mark.parametrize(("where", "parameters", "purpose"), LEANS_ON, ids=[entry[0] for entry in LEANS_ON])
def test_transformers_still_has(where: str, parameters: tuple[str, ...], purpose: str) -> None:
    broken = (
        f"transformers {transformers.__version__} broke the seam: {where}({', '.join(parameters)}); by it, {purpose}"
    )
    module, *attributes = _split(where)
    thing: Any = importlib.import_module(f"transformers.{module}")
    for attribute in attributes:
        assert hasattr(thing, attribute), broken
        thing = getattr(thing, attribute)
    missing = set(parameters) - set(inspect.signature(thing).parameters)
    assert not missing, f"{broken}; it no longer takes {', '.join(sorted(missing))}"


def _split(where: str) -> list[str]:
    """Module first, then attributes."""
    parts = where.split(".")
    depth = 2 if parts[0] == "integrations" else 1
    return [".".join(parts[:depth]), *parts[depth:]]


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "llama"])
def test_experts_modules_still_carry_the_marks_of_the_registry(architecture: str) -> None:
    """``use_experts_implementation`` sets these on every experts module, and the experts' arithmetic reads them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture))
    experts = [module for name, module in model.named_modules() if name.endswith("experts") and "shared" not in name]
    assert experts, f"transformers {transformers.__version__} names the experts of {architecture} otherwise"
    for module in experts:
        broken = f"transformers {transformers.__version__} broke the seam: {type(module).__name__}"
        for mark in ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate"):
            assert hasattr(module, mark), f"{broken} has no {mark}; use_experts_implementation no longer wraps it"
        taken = [*inspect.signature(type(module).forward).parameters]
        assert taken[1] == "hidden_states", f"{broken}.forward takes {taken}"
        assert len(taken) == 4, f"{broken}.forward takes {taken}, not hidden states, chosen experts and their weights"


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3_next", "jamba"])
def test_a_cache_made_from_a_configuration_drops_rows(architecture: str) -> None:
    """Finished rows leave by ``reorder_cache`` with fewer indices than rows: beam search itself never shortens."""
    config = tiny_config(architecture)
    cache = DynamicCache(config=config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model(torch.full((3, 5), 7), past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([2]))
        logits = model(torch.full((1, 1), 7), past_key_values=cache, use_cache=True).logits
    assert logits.shape[0] == 1, (
        f"transformers {transformers.__version__} broke the seam: reorder_cache keeps dropped rows"
    )
