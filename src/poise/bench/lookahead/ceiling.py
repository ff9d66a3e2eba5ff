"""Why recall ends where it does: the same residual given more than the hidden states one MoE layer before.

``hidden``: as the predictor has it. ``after experts``: besides, the token's state behind the layer's experts, scaled to length
one per dimension: all that the next layer adds to is then known, but for what its attention brings in from other tokens.
``token before``: besides, the hidden states of the token before. Not predictors: what they need is not there in time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from poise.bench.lookahead.seen import Seen, load_model, see, windows
from poise.bench.routed_text import Ints
from poise.model.lookahead import Lookahead, Residual
from poise.model.lookahead_training import Training, router_loss
from poise.predict.lookahead_quality import recall

LEARNT_WINDOWS = (400, 400)
HELD_OUT_WINDOWS = (48, 48)
WIDTH = 256
LAYERS = (1, 3, 5)


def measure() -> dict[str, Any]:
    """Held-out recall of some layers, by what was known."""
    model, modules = load_model()
    sides = []
    for part, counts in (("train", LEARNT_WINDOWS), ("held_out", HELD_OUT_WINDOWS)):
        ids_WT = np.concatenate(windows(part, counts))
        sides.append(_with_streams(model, modules, ids_WT))
    lookahead = Lookahead.of_model(model, modules)
    rows = []
    for layer in LAYERS:
        for known in ("hidden", "after experts", "token before"):
            learnt_TX, held_out_TX = (_inputs(known, layer, *side) for side in sides)
            found = _recall(lookahead, layer, sides[0][0], learnt_TX, sides[1][0], held_out_TX)
            rows.append({"layer": layer, "known": known, "recall": found})
    return {"learnt_tokens": sides[0][0].tokens, "width": WIDTH, "rows": rows}


def _with_streams(model: Any, modules: Any, ids_WT: Ints) -> tuple[Seen, dict[int, torch.Tensor]]:
    """What is seen, and what leaves the decoder layers before those that are predicted."""
    streams: dict[int, list[torch.Tensor]] = {layer - 1: [] for layer in LAYERS}

    def note(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            streams[layer].append(states.reshape(-1, states.shape[-1]).clone())

        return hook

    hooks = [model.model.layers[layer].register_forward_hook(note(layer)) for layer in streams]
    seen = see(model, modules, ids_WT)
    for hook in hooks:
        hook.remove()
    return seen, {layer: torch.cat(states) for layer, states in streams.items()}


def _inputs(known: str, layer: int, seen: Seen, streams: dict[int, torch.Tensor]) -> torch.Tensor:
    hidden_TH = seen.hidden_LTH[layer - 1]
    if known == "hidden":
        return hidden_TH
    if known == "token before":
        return torch.cat([hidden_TH, hidden_TH.roll(1, dims=0)], dim=1)
    stream_TH = streams[layer - 1].float()
    scaled_TH = stream_TH / stream_TH.square().mean(dim=1, keepdim=True).sqrt()
    return torch.cat([hidden_TH, scaled_TH.to(hidden_TH.dtype)], dim=1)


def _recall(
    lookahead: Lookahead, layer: int, learnt: Seen, learnt_TX: torch.Tensor, held_out: Seen, held_out_TX: torch.Tensor
) -> float:
    """Trains a residual over these inputs as ``lookahead_training`` does, and examines it."""
    training, experts, hidden = Training(), lookahead.experts_L[layer], learnt.hidden_LTH.shape[2]
    random = torch.Generator().manual_seed(0)
    residual = Residual(learnt_TX.shape[1], WIDTH, experts, device=torch.device("cpu"), random=random)
    optimiser = torch.optim.Adam(residual.parameters(), lr=0.0, betas=training.betas)
    batches = torch.randperm(len(learnt_TX), generator=random).split(training.batch_tokens)  # type: ignore[no-untyped-call]
    for number, chosen_T in enumerate(batches):
        warm_frac = min(1.0, (number + 1) / training.warm_up_steps)
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * warm_frac * (1.0 - number / len(batches))
        inputs_TX = learnt_TX[chosen_T]
        logits_TE = lookahead.own_logits_TE(layer, inputs_TX[:, :hidden]) + residual(inputs_TX)
        true_TE = lookahead.own_logits_TE(layer, learnt.hidden_LTH[layer, chosen_T])
        optimiser.zero_grad()
        router_loss(logits_TE, true_TE, lookahead.scores(layer)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        named_TK = lookahead.router(layer).choices_TK(held_out_TX[:, :hidden], residual(held_out_TX))
    return recall(named_TK.numpy(), held_out.chosen_LTK[layer], experts)
