"""What one sequence's cache takes and how many experts a token chooses, asked of the model itself.

Two short forwards with experts that answer zero: cache sizes are exact and need no table of architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental import _config as meta_config

from poise.errors import CheckpointError
from poise.model.cache import make_cache, movable_layers, tensors_in
from poise.model.seam import Forward, attach
from poise.spec.model_spec import CacheSpec

SHORT_TOKENS = 2
LONG_TOKENS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What the forwards showed."""

    cache: CacheSpec
    top_k: int


NOTHING_KNOWN = Probed(
    cache=CacheSpec(bytes_per_token=0, largest_layer_bytes_per_token=0, state_bytes=0, movable_bytes_per_token=0),
    top_k=1,
)
"""The least that any model may show."""


def probe_ahead(model: Any) -> Probed:
    """The same of a model on the meta device, before weights are read: only shapes are computed.

    ``NOTHING_KNOWN`` for a class whose forward looks at values, of which there are none yet (no class of transformers 5.23).
    """
    attach(model)
    try:
        with meta_config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]  # made at import
            return probe(model.eval(), torch.device("meta"))
    except (NotImplementedError, CheckpointError):
        return NOTHING_KNOWN


def probe(model: Any, device: torch.device) -> Probed:
    """Runs the dense part over a few tokens. The seam must be attached. Raises CheckpointError for a model that cannot run."""
    with torch.inference_mode():
        short, top_k, _ = _layer_bytes(model, SHORT_TOKENS, device)
        long, _, movable = _layer_bytes(model, LONG_TOKENS, device)
    per_token = [(b - a) // (LONG_TOKENS - SHORT_TOKENS) for a, b in zip(short, long, strict=True)]
    state = sum(a - each * SHORT_TOKENS for a, each in zip(short, per_token, strict=True))
    cache = CacheSpec(
        bytes_per_token=sum(per_token),
        largest_layer_bytes_per_token=max(per_token, default=0),
        state_bytes=max(0, state),
        movable_bytes_per_token=sum(per_token[1 + place] for place in movable),
        movable_layers=len(movable),
    )
    return Probed(cache=cache, top_k=top_k)


def _layer_bytes(model: Any, tokens: int, device: torch.device) -> tuple[list[int], int, list[int]]:
    cache = make_cache(model)
    movable = movable_layers(model, cache)
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)
    forward = Forward(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    top_k = 0
    try:
        parked = forward.start()
        while parked is not None:
            top_k = max(top_k, parked.top_k_index_TK.shape[1])
            parked = forward.resume(torch.zeros_like(parked.hidden_TH))
    except NotImplementedError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the model cannot run as its config.json describes it: {reason}") from error
    finally:
        forward.abort()
    parts = [vars(cache), *(vars(layer) for layer in cache.layers)]
    return [sum(tensor.nbytes for tensor in tensors_in(part)) for part in parts], top_k, movable
