"""Steps that the balance planner is measured on: model shapes, ranks, skews, and tokens by the rank they are born on.

Synthetic: experts' shares follow a Zipf law whose exponent is fitted to an imbalance of the static placement, and each rank's
requests deviate from it by a lognormal factor, an assumption. Letters: R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.plan.balance import Balancer, Strategy
from poise.plan.rank_costs import RankCosts
from poise.spec.bundled import find_machine
from poise.spec.curve import Shape

Counts = npt.NDArray[np.int32]

RANK_SIGMA = 0.3
"""Of the logarithm of each rank's share of each expert, against that of all ranks."""
WINDOW_FACTOR = 2.0
"""Windows are the time of the layer's experts, balanced, times this: attention is taken to last as long as the experts."""
PHASES = {"prefill": 1024, "decode": 128}
"""Tokens of each rank in a step."""
SKEWS = (1.5, 2.1, 2.6)
"""Most tokens of a rank over the mean, experts where they are at home."""
FIT_STEPS, FIT_HALVINGS = 16, 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One MoE layer over ``ranks``."""

    name: str
    experts: int
    top_k: int
    ranks: int
    shape: Shape
    expert_bytes: float

    @property
    def token_bytes(self) -> float:
        return 2.0 * self.shape.hidden


MODELS = (
    Model(
        name="Qwen3-235B",
        experts=128,
        top_k=8,
        ranks=8,
        shape=Shape(hidden=4096, intermediate=1536, dtype="bfloat16"),
        expert_bytes=3.0 * 4096 * 1536 * 2,
    ),
    Model(
        name="DeepSeek-V3",
        experts=256,
        top_k=8,
        ranks=64,
        shape=Shape(hidden=7168, intermediate=2048, dtype="float8_e4m3fn"),
        expert_bytes=3.0 * 7168 * 2048,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """``steps``: counts_RE of each. ``window_s``: of every rank."""

    model: Model
    machine: str
    phase: str
    skew: float
    costs: RankCosts
    link_bytes_per_s: float
    window_s: float
    steps: tuple[Counts, ...]

    def balancer(self, strategy: Strategy, *, replica_slots: int = 3) -> Balancer:
        return Balancer(
            self.costs,
            np.arange(self.model.experts),
            num_experts=self.model.experts,
            link_bytes_per_s_R=self.link_bytes_per_s,
            token_bytes=self.model.token_bytes,
            expert_bytes=self.model.expert_bytes,
            most_tokens=float(self.steps[0].sum()),
            replica_slots=replica_slots,
            strategy=strategy,
        )

    @property
    def gives(self) -> int:
        """Experts that the window lets a rank send, and take in."""
        return int(self.window_s * self.link_bytes_per_s / self.model.expert_bytes)


def case_of(model: Model, machine_name: str, phase: str, skew: float, *, steps: int, seed: int = 0) -> Case:
    """Steps of one kind; the same seed gives the same counts whatever the machine."""
    machine = find_machine(machine_name)
    costs = RankCosts.of_machine(replace(machine, links=()), ranks=model.ranks, shape=model.shape)
    rng = np.random.default_rng(seed)
    steepness = _fitted(model, skew, np.random.default_rng(seed))
    drawn = tuple(_step(model, PHASES[phase], steepness, rng) for _ in range(steps))
    each = np.full((1, model.ranks), float(PHASES[phase] * model.top_k))
    balanced_s = float(costs.seconds_LR(each, np.full((1, model.ranks), model.experts / model.ranks)).mean())
    return Case(
        model=model,
        machine=machine_name,
        phase=phase,
        skew=skew,
        costs=costs,
        link_bytes_per_s=find_machine("h200").links[0].bytes_per_s,
        window_s=WINDOW_FACTOR * balanced_s,
        steps=drawn,
    )


def imbalance(counts_RE: Counts) -> float:
    """Most tokens of a rank over the mean, with consecutive experts on consecutive ranks."""
    tokens_R = counts_RE.sum(axis=0).reshape(len(counts_RE), -1).sum(axis=1)
    return float(tokens_R.max() / tokens_R.mean())


def _step(model: Model, tokens: int, steepness: float, rng: np.random.Generator) -> Counts:
    share_E = rng.permutation(1.0 / np.arange(1, model.experts + 1) ** steepness)
    share_RE = share_E * rng.lognormal(0.0, RANK_SIGMA, (model.ranks, model.experts))
    share_RE /= share_RE.sum(axis=1, keepdims=True)
    return np.stack([rng.multinomial(tokens * model.top_k, share) for share in share_RE]).astype(np.int32)


def _fitted(model: Model, skew: float, rng: np.random.Generator) -> float:
    """The exponent that gives the skew, in the mean over steps."""
    low, high = 0.0, 2.5
    for _ in range(FIT_HALVINGS):
        middle = (low + high) / 2
        seen = np.mean([imbalance(_step(model, 1024, middle, rng)) for _ in range(FIT_STEPS)])
        low, high = (middle, high) if seen < skew else (low, middle)
    return (low + high) / 2
