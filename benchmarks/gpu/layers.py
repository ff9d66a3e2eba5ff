"""Experts of Qwen3's shapes, computed by one grouped product for all of a rank, and the loads of one rank of 8."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import Qwen3MoeConfig

from poise.bench.balance.steps import MODELS, Case, case_of, imbalance
from poise.profile.subject import Subject, subject_of_config

SHAPES = {"Qwen3-30B-A3B": (2048, 768, 32), "Qwen3-235B-A22B": (4096, 1536, 64)}
"""Hidden, intermediate, attention heads; 128 experts, 8 of them a token."""
EXPERTS, TOP_K, RANKS = 128, 8, 8
SKEW = 2.1
"""Most tokens of a rank over the mean, experts at home: PROBE's paper has 2.13."""
DRAWN = 32
"""Steps, of which the one whose skew is nearest counts."""
TOKENS = {"decode": 768, "prefill": 8192}
"""Of each rank in a step."""


def subject_of(name: str) -> Subject:
    """Two layers of random weights, in memory."""
    hidden, intermediate, heads = SHAPES[name]
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=2,
    )
    return subject_of_config(name, config, torch.bfloat16)


class GroupedExperts:
    """``count`` experts with random weights (bf16), computed with two grouped products."""

    def __init__(self, name: str, count: int) -> None:
        hidden, intermediate, _ = SHAPES[name]
        self.up_ENH = _small(count, 2 * intermediate, hidden)
        self.down_EHI = _small(count, hidden, intermediate)
        self.expert_bytes = 3 * hidden * intermediate * 2
        self.hidden = hidden

    def __call__(self, rows_PH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """``rows_PH``: tokens of expert 0, then of 1, ...; ``ends_E`` (int32): where each one's end."""
        both = torch._grouped_mm(rows_PH, self.up_ENH.transpose(1, 2), offs=ends_E)
        gate, up = both.chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.down_EHI.transpose(1, 2), offs=ends_E)


def rows_for(tokens_E: np.ndarray, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows for so many tokens of each expert, and where each one's end."""
    rows = torch.randn(int(tokens_E.sum()), hidden, device="cuda").to(torch.bfloat16)
    return rows, torch.from_numpy(np.cumsum(tokens_E)).to("cuda", torch.int32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Load:
    """Tokens by expert on a rank: on the fullest without replicas, and on one with all its replicas, which come last."""

    static_E: np.ndarray
    balanced_E: np.ndarray
    replicas: int
    fullest_before: int
    fullest_after: int
    mean: float


def load_of(phase: str) -> tuple[Case, Load]:
    """One step of 8 ranks with Qwen3-235B's experts, planned with as many replicas as slots hold."""
    case = case_of(MODELS[0], "h200", phase, SKEW, steps=DRAWN)
    usual_RE = min(case.steps, key=lambda counts_RE: abs(imbalance(counts_RE) - SKEW))
    counts_RE = usual_RE * (TOKENS[phase] * TOP_K // int(usual_RE[0].sum()))
    case = replace(case, steps=(counts_RE,))
    plan = case.balancer("quota").choose_replicas(counts_RE, np.full(RANKS, 1.0))
    tokens_ER = plan.assignment.tokens_ER(RANKS)
    home_ER = np.zeros_like(tokens_ER)
    home_ER[np.arange(EXPERTS), np.arange(EXPERTS) // (EXPERTS // RANKS)] = counts_RE.sum(axis=0)
    came_R = np.bincount([target for _, _, target in plan.replica_N3.tolist()], minlength=RANKS)
    rank, fullest = int(came_R.argmax()), int(home_ER.sum(axis=0).argmax())
    return case, Load(
        static_E=home_ER[:, fullest][home_ER[:, fullest] > 0],
        balanced_E=tokens_ER[:, rank][tokens_ER[:, rank] > 0],
        replicas=int(came_R[rank]),
        fullest_before=int(home_ER.sum(axis=0).max()),
        fullest_after=int(tokens_ER.sum(axis=0).max()),
        mean=float(tokens_ER.sum(axis=0).mean()),
    )


def _small(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).uniform_(-0.02, 0.02)
