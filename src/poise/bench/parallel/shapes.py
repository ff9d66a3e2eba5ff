"""What a model's shapes say of the work in a pass: layers, and the predictors' share of the experts' FLOPs.

Arithmetic alone. Letters: H hidden size, E experts, K choices of a token, I an expert's width, W a residual's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.model.lookahead import LOOKAHEAD_FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of a model whose decoder layers all have experts."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_width: int

    def predicting_frac(self, residual_width: int | None) -> float:
        """FLOPs of the predictors over those of the experts: H E for a router asked early, H W + W E for what was trained
        besides, in all layers but the first; 3 H I K in all."""
        width = residual_width or 0
        predictor = self.hidden * self.experts + self.hidden * width + width * self.experts
        experts = 3 * self.hidden * self.expert_width * self.top_k
        return (self.layers - 1) * predictor / (self.layers * experts)


def shape_of(model: Path) -> Shape:
    """From the configuration of a checkpoint of the benchmarks, whose experts transformers has called by two names."""
    config = json.loads((model / "config.json").read_text())
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        experts=config["num_local_experts" if "num_local_experts" in config else "num_experts"],
        top_k=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
    )


def predicting_frac(model: Path, steps: Mapping[str, Any]) -> float:
    """The share of the experts' FLOPs that predicting takes with these ``StepOptions``: 0 where counts cost nothing to know."""
    if steps.get("predictor", "gate") != "gate":
        return 0.0
    lookahead = steps.get("lookahead")
    width = None if lookahead is None else LOOKAHEAD_FORMAT.load(Path(lookahead))[0]["inner"].shape[1]
    return shape_of(model).predicting_frac(width)
