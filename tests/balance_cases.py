"""Steps to be balanced that tests share: one curve, one link, the cost model written out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.cost.curves import ClosedFormCurve
from poise.cost.experts import ExpertCurve
from poise.plan.balance import LEAST_ACTIVE, LEAST_TOKENS, Balancer, Strategy
from poise.plan.rank_costs import RankCosts

EXPERT_S, TOKEN_S, LINK = 20e-6, 0.2e-6, 1e9
TOKEN_BYTES, EXPERT_BYTES = 50.0, 1e5


def costs_of(speed_R: npt.NDArray[np.float64], *, expert_s: float = EXPERT_S, p: float = 1.25) -> RankCosts:
    curve = ExpertCurve({1: ClosedFormCurve(expert_s, TOKEN_S, p)})
    return RankCosts.of_curves([curve] * len(speed_R), speed_R)


def balancer(
    speed_R: npt.NDArray[np.float64],
    experts: int,
    *,
    slots_S: npt.ArrayLike | None = None,
    strategy: Strategy = "quota",
    replica_slots: int = 3,
    most_tokens: float = 1e5,
    expert_s: float = EXPERT_S,
    token_bytes: float = TOKEN_BYTES,
    p: float = 1.25,
    least_tokens: float = LEAST_TOKENS,
    least_active: float = LEAST_ACTIVE,
) -> Balancer:
    return Balancer(
        costs_of(speed_R, expert_s=expert_s, p=p),
        np.arange(experts) if slots_S is None else slots_S,
        num_experts=experts,
        link_bytes_per_s_R=LINK,
        token_bytes=token_bytes,
        expert_bytes=EXPERT_BYTES,
        most_tokens=most_tokens,
        replica_slots=replica_slots,
        strategy=strategy,
        least_tokens=least_tokens,
        least_active=least_active,
    )


def seconds_R(
    counts_RE: npt.NDArray[np.integer], tokens_ER: npt.NDArray[np.integer], speed_R: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The cost model of the paper, written out: experts, and twice the heavier direction of the link."""
    local_ER = np.minimum(tokens_ER, counts_RE.T)
    in_R, out_R = (tokens_ER - local_ER).sum(axis=0), (counts_RE.T - local_ER).sum(axis=0)
    active_R = (tokens_ER > 0).sum(axis=0).astype(float)
    compute_R = costs_of(speed_R).seconds_LR(tokens_ER.sum(axis=0)[None].astype(float), active_R[None])[0]
    return np.asarray(compute_R + 2 * TOKEN_BYTES / LINK * np.maximum(in_R, out_R))
