"""What ranks that share the experts did, pass by pass and layer by layer: imbalance, time, waiting, bytes.

Pure: numbers of all ranks in, a frozen summary out, which can be joined to that of the passes before. Letters: R ranks, P
passes, L MoE layers. Seconds are of each rank's own clock; no clock is compared with another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.report.of_passes import Floats, OfPasses, over_mean, spread
from poise.units import format_bytes, format_s

MOST_RANKS = 16
"""Ranks that a summary for people lists; of more, those that the others wait for."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankFigures(OfPasses):
    """Imbalance is the most of a rank over the mean of all: of (token, expert) pairs, and of the time of experts.

    By pass: ``pass_s_P`` of the slowest rank; imbalances, means over layers; ``slowest_s_P``, what the slowest rank of each
    layer took for its experts, summed over layers; ``waited_s_P`` and ``sent_bytes_P``, of all ranks, bytes one way.
    By layer, means over passes: the same but ``pass_s_P``; the wait before a pass is no layer's.
    By rank and pass, sums over layers: ``expert_s_RP``, ``waited_s_RP``.
    By rank, sums over passes: seconds in experts, waiting for other ranks, exchanging, and in the rest of the model; bytes
    sent; pairs computed. Where passes run in halves, waiting and exchanging lie behind the other two.
    """

    imbalance_P: Floats
    time_imbalance_P: Floats
    slowest_s_P: Floats
    waited_s_P: Floats
    sent_bytes_P: Floats
    imbalance_L: Floats
    time_imbalance_L: Floats
    slowest_s_L: Floats
    waited_s_L: Floats
    sent_bytes_L: Floats
    expert_s_RP: Floats
    waited_s_RP: Floats
    expert_s_R: Floats
    waited_s_R: Floats
    exchange_s_R: Floats
    rest_s_R: Floats
    sent_bytes_R: Floats
    pairs_R: Floats

    def to_json(self) -> dict[str, Any]:
        """For machines: a summary, then by rank, by layer, by pass, and by rank and pass."""
        return {
            "passes": self.passes,
            "imbalance": spread(self.imbalance_P),
            "time_imbalance": spread(self.time_imbalance_P),
            "pass_s": spread(self.pass_s_P),
            "ranks": self.table("_R"),
            "layers": self.table("_L"),
            "steps": self.table("_P"),
            "ranks_steps": self.table("_RP"),
        }

    def lines(self) -> list[str]:
        """For people: how even the ranks were, and where each one's time went."""
        tokens, times = spread(self.imbalance_P), spread(self.time_imbalance_P)
        first = (
            f"experts, most of a rank over the mean: tokens {tokens['mean']:.2f} (95 % of passes below {tokens['p95']:.2f}), "
            f"time {times['mean']:.2f} (below {times['p95']:.2f})"
        )
        ranks = np.argsort(self.waited_s_R, kind="stable")[:MOST_RANKS]
        left = len(self.waited_s_R) - len(ranks)
        more = [f"{left} more ranks, which waited longer"] if left else []
        return [first, *(self._line(rank) for rank in sorted(ranks.tolist())), *more]

    def _line(self, rank: int) -> str:
        return (
            f"rank {rank}: experts {format_s(self.expert_s_R[rank])}, rest of the model {format_s(self.rest_s_R[rank])}, "
            f"waiting {format_s(self.waited_s_R[rank])}, exchange {format_s(self.exchange_s_R[rank])}, "
            f"{format_bytes(self.sent_bytes_R[rank])} sent"
        )


def figures_of(layer: Mapping[str, Floats], pass_s_RP: Floats, agreed_s_RP: Floats) -> RankFigures:
    """``layer``: by name of a field of ``parallel.moe_layer.LayerRecord``, its value of each rank, pass and layer (R, P, L).

    ``pass_s_RP``: of each pass; ``agreed_s_RP``: of the agreement before it. Of several ranks that wait for each other one
    waits for nobody: what it measures is the message itself, and what others measure beyond that is waiting.
    """
    pairs_RPL, compute_RPL = layer["routed_tokens"], layer["compute_s"]
    met_RPL, back_RPL = layer["waited_s"], layer["combine_s"]
    waited_RPL = (met_RPL - met_RPL.min(axis=0)) + (back_RPL - back_RPL.min(axis=0))
    exchange_RPL = layer["dispatch_s"] + met_RPL.min(axis=0) + back_RPL.min(axis=0)
    imbalance_PL, time_imbalance_PL = over_mean(pairs_RPL), over_mean(compute_RPL)
    slowest_PL = compute_RPL.max(axis=0)
    sent_RPL = layer["sent_bytes"]
    waited_RP = waited_RPL.sum(axis=2) + agreed_s_RP - agreed_s_RP.min(axis=0)
    return RankFigures(
        pass_s_P=pass_s_RP.max(axis=0),
        imbalance_P=imbalance_PL.mean(axis=1),
        time_imbalance_P=time_imbalance_PL.mean(axis=1),
        slowest_s_P=slowest_PL.sum(axis=1),
        waited_s_P=waited_RP.sum(axis=0),
        sent_bytes_P=sent_RPL.sum(axis=(0, 2)),
        imbalance_L=imbalance_PL.mean(axis=0),
        time_imbalance_L=time_imbalance_PL.mean(axis=0),
        slowest_s_L=slowest_PL.mean(axis=0),
        waited_s_L=waited_RPL.sum(axis=0).mean(axis=0),
        sent_bytes_L=sent_RPL.sum(axis=0).mean(axis=0),
        expert_s_RP=compute_RPL.sum(axis=2),
        waited_s_RP=waited_RP,
        expert_s_R=compute_RPL.sum(axis=(1, 2)),
        waited_s_R=waited_RP.sum(axis=1),
        exchange_s_R=exchange_RPL.sum(axis=(1, 2)),
        rest_s_R=np.maximum(pass_s_RP.sum(axis=1) - layer["total_s"].sum(axis=(1, 2)), 0.0),
        sent_bytes_R=sent_RPL.sum(axis=(1, 2)),
        pairs_R=pairs_RPL.sum(axis=(1, 2)),
    )
