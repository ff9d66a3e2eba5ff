"""What one sequence's cache takes and how many experts a token chooses, asked of the model itself.

Two short forwards with experts that answer zero: cache sizes are exact and need no table of architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from poise.model.cache import make_cache, tensors_in
from poise.model.seam import Forward
from poise.spec.model_spec import CacheSpec

SHORT_TOKENS = 2
LONG_TOKENS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What the forwards showed."""

    cache: CacheSpec
    top_k: int


def probe(model: Any, device: torch.device) -> Probed:
    """Runs the dense part over a few tokens. The seam must be attached."""
    with torch.inference_mode():
        short, top_k = _layer_bytes(model, SHORT_TOKENS, device)
        long, _ = _layer_bytes(model, LONG_TOKENS, device)
    per_token = [(b - a) // (LONG_TOKENS - SHORT_TOKENS) for a, b in zip(short, long, strict=True)]
    state = sum(a - each * SHORT_TOKENS for a, each in zip(short, per_token, strict=True))
    cache = CacheSpec(
        bytes_per_token=sum(per_token),
        largest_layer_bytes_per_token=max(per_token, default=0),
        state_bytes=max(0, state),
    )
    return Probed(cache=cache, top_k=top_k)


def _layer_bytes(model: Any, tokens: int, device: torch.device) -> tuple[list[int], int]:
    cache = make_cache(model)
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)
    forward = Forward(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    top_k = 0
    try:
        parked = forward.start()
        while parked is not None:
            top_k = max(top_k, parked.top_k_index_TK.shape[1])
            parked = forward.resume(torch.zeros_like(parked.hidden_TH))
    finally:
        forward.abort()
    parts = [vars(cache), *(vars(layer) for layer in cache.layers)]
    return [sum(tensor.nbytes for tensor in tensors_in(part)) for part in parts], top_k
