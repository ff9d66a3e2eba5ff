"""Teaches a lookahead's residuals what the true routers do, from the hidden states of the same tokens at two seams in a row.

The loss is the cross-entropy to the true router's distribution over experts: of a softmax, or expert by expert of a sigmoid,
whose experts do not compete; other score functions have no distribution, and their logits are matched. Only the residuals
learn; the frozen routers are asked outside the graph. What comes in are ordinary tensors, cloned outside inference mode.
Letters: T tokens, H hidden size, E experts. Source: PROBE (arXiv 2602.00509), online distillation; figures: decision 043.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from poise.model.lookahead import Lookahead

WIDTH = 128
"""Of a residual. Decision 043."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How residuals learn. ``batch_tokens``: of one step. The rate rises over ``warm_up_steps`` from zero."""

    learning_rate: float = 5e-3
    batch_tokens: int = 256
    warm_up_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        assert self.learning_rate > 0, "a rate is above 0"
        assert self.batch_tokens >= 1, "a step has a token"


class Trainer:
    """An Adam of its own for each learning layer of ``lookahead``. ``seed``: of the order of tokens within a call."""

    def __init__(self, lookahead: Lookahead, training: Training, *, seed: int = 0) -> None:
        self._lookahead = lookahead
        self._training = training
        self._order = torch.Generator().manual_seed(seed)
        self._steps_L = dict.fromkeys(lookahead.learning_layers, 0)
        self._optimisers = {
            layer: torch.optim.Adam(lookahead.residual(layer).parameters(), lr=0.0, betas=training.betas)
            for layer in lookahead.learning_layers
        }

    def learn(self, layer: int, before_TH: torch.Tensor, own_TH: torch.Tensor, *, rate_frac: float = 1.0) -> float:
        """Steps over all of these tokens once, in random order; returns the mean loss in nats.

        ``before_TH``: at the seam of ``layer - 1``; ``own_TH``: of the same tokens at the seam of ``layer``. ``rate_frac``:
        of the learning rate, for a schedule.
        """
        assert len(before_TH) == len(own_TH), "the same tokens at both seams"
        order_T = torch.randperm(len(own_TH), generator=self._order)
        count = -(-len(own_TH) // self._training.batch_tokens)
        with torch.inference_mode(False), torch.enable_grad():
            losses = [
                self._step(layer, before_TH[chosen_T], own_TH[chosen_T], rate_frac) * len(chosen_T)
                for chosen_T in order_T.chunk(count)
            ]
        return sum(losses) / len(own_TH)

    def _step(self, layer: int, before_TH: torch.Tensor, own_TH: torch.Tensor, rate_frac: float) -> float:
        lookahead, optimiser, training = self._lookahead, self._optimisers[layer], self._training
        self._steps_L[layer] += 1
        warm_frac = min(1.0, self._steps_L[layer] / training.warm_up_steps)
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * rate_frac * warm_frac
        frozen_TE, true_TE = lookahead.own_logits_TE(layer, before_TH), lookahead.own_logits_TE(layer, own_TH)
        loss = router_loss(frozen_TE + lookahead.residual(layer)(before_TH), true_TE, lookahead.scores(layer))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return float(loss.detach())


def router_loss(logits_TE: torch.Tensor, true_TE: torch.Tensor, scores: str) -> torch.Tensor:
    """Mean over tokens. ``scores``: what the router makes of its logits, as ``Lookahead.scores`` says."""
    if scores == "softmax":
        return nn.functional.cross_entropy(logits_TE, true_TE.softmax(dim=-1))
    if scores == "sigmoid":
        each_TE = nn.functional.binary_cross_entropy_with_logits(logits_TE, true_TE.sigmoid(), reduction="none")
        return each_TE.sum(dim=-1).mean()
    return (logits_TE - true_TE).square().sum(dim=-1).mean()


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary copy of a tensor that was made in inference mode, as training needs it."""
    with torch.inference_mode(False):
        return tensor.clone()
