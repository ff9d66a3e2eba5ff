"""The next token of each row from its logits. The filters are transformers' own; randomness belongs to the sequence."""

from __future__ import annotations

import math

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from poise.engine.sampling import SamplingParams


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """The sequence's own source of randomness; None when it is greedy."""
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def choose_token(logits_V: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """One token from the logits of one row, any float dtype. Raises FloatingPointError when they hold NaN or infinity.

    The largest is all that is looked at: a maximum over NaN is NaN. Minus infinity is a token that a model rules out.
    """
    best = int(logits_V.argmax())
    if not math.isfinite(float(logits_V[best])):
        raise FloatingPointError(f"the largest of the logits is {float(logits_V[best])}")
    if generator is None:
        return best
    scores = logits_V.float().cpu()[None]  # where the sequence's own randomness is
    ids = torch.empty(1, 0, dtype=torch.long)
    if params.temperature != 1.0:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k is not None:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))
