"""One MoE layer for a whole group of batches: each expert once, over the tokens of all of them.

The order is that of arrival (residents first), yet the result does not depend on it: every (token, choice) has its own
row of contributions, summed over the choices at the end. Padding tokens and masked choices ask for no expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Protocol

import torch

from poise.model.experts import expert_forward, padded_rows
from poise.model.layout import Weights
from poise.model.seam import Parked
from poise.model.streams import settle
from poise.plan.memory import MAX_EXPERT_ROWS
from poise.spec.timeline import COMPUTE, Timeline


class Experts(Protocol):
    """Where a layer's experts come from, such as ``offload.expert_store``: each that was asked for is taken once."""

    def take(self) -> tuple[int, Weights]: ...

    def release(self, expert: int) -> None: ...


def chosen_experts(parked: Parked, real_T: torch.Tensor | None) -> list[int]:
    """The experts that the real tokens of a batch chose, ascending. ``real_T``: bool, False for padding; None: all real."""
    chosen = parked.top_k_index_TK if real_T is None else parked.top_k_index_TK[real_T]
    num_experts: int = parked.module.num_experts  # type: ignore[assignment]
    return [expert for expert in torch.unique(chosen).tolist() if expert < num_experts]


def run_experts(
    store: Experts,
    parked: Sequence[Parked],
    real: Sequence[torch.Tensor | None],
    *,
    layer: int = 0,
    timeline: Timeline | None = None,
) -> list[torch.Tensor]:
    """The experts' outputs for every parked batch, shapes as their hidden states.

    The experts they chose must have been requested from the store. ``layer`` is what the timeline calls this one.
    """
    module = parked[0].module
    hidden_TH = joined([entry.hidden_TH for entry in parked])
    index_TK = joined([entry.top_k_index_TK for entry in parked])
    weights_TK = joined([entry.top_k_weights_TK for entry in parked])
    num_experts: int = module.num_experts  # type: ignore[assignment]
    tokens, top_k = index_TK.shape
    choice_TK = real_choices_TK(index_TK, real, [len(entry.hidden_TH) for entry in parked], num_experts)
    choice_P = choice_TK.reshape(-1)
    order_P = choice_P.argsort(stable=True)
    ends = torch.bincount(choice_P, minlength=num_experts + 1).cumsum(0).tolist()
    begin_of = {expert: ends[expert - 1] if expert else 0 for expert in range(num_experts)}
    num_active = sum(ends[expert] > begin_of[expert] for expert in range(num_experts))
    all_real = ends[num_experts - 1] == tokens * top_k
    make = hidden_TH.new_empty if all_real else hidden_TH.new_zeros
    contributions_PH = make(tokens * top_k, hidden_TH.shape[1])
    weights_P = weights_TK.reshape(-1, 1)
    for _ in range(num_active):
        expert, weights = store.take()
        began_ns = perf_counter_ns()
        for pairs in torch.split(order_P[begin_of[expert] : ends[expert]], MAX_EXPERT_ROWS):
            padded = _padded(pairs, hidden_TH.dtype, weights)
            output = expert_forward(module, hidden_TH.index_select(0, padded // top_k), weights, weights_P[padded])[
                : len(pairs)
            ]
            contributions_PH.index_copy_(0, pairs, output.to(contributions_PH.dtype))
        if timeline is not None:
            settle(hidden_TH.device)
            rows = ends[expert] - begin_of[expert]
            timeline.add(COMPUTE, "expert", began_ns, layer=layer, expert=expert, rows=rows)
        store.release(expert)
    output_TH = contributions_PH.view(tokens, top_k, -1).sum(dim=1)
    return list(torch.split(output_TH, [len(entry.hidden_TH) for entry in parked]))


def _padded(pairs: torch.Tensor, dtype: torch.dtype, weights: Weights) -> torch.Tensor:
    """The choices of one expert, the first repeated at the end up to a row count that occurs often."""
    more = 0 if pairs.is_cuda else padded_rows(len(pairs), dtype, weights) - len(pairs)
    return torch.nn.functional.pad(pairs, (0, more), value=int(pairs[0])) if more else pairs


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rows, one batch below the other; a single batch is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def real_choices_TK(
    index_TK: torch.Tensor, real: Sequence[torch.Tensor | None], tokens: Sequence[int], num_experts: int
) -> torch.Tensor:
    """Every choice's expert; ``num_experts`` where the token is padding or the router masked the choice.

    ``tokens``: how many each batch has.
    """
    choice_TK = index_TK.clamp(max=num_experts)
    if any(mask is not None for mask in real):
        whole = [
            mask if mask is not None else torch.ones(n, dtype=torch.bool, device=index_TK.device)
            for mask, n in zip(real, tokens, strict=True)
        ]
        choice_TK = choice_TK.masked_fill(~torch.cat(whole)[:, None], num_experts)
    return choice_TK
