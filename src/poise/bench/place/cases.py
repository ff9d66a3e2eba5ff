"""What placements are planned for: model shapes, devices, speeds, and where tokens go.

Loads are synthetic but for the bundled model's. No law of how loads drift is published: the drift here is an assumption.
Letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.plan.rank_costs import RankCosts
from poise.spec.bundled import find_machine
from poise.spec.curve import Shape
from poise.spec.machine import Machine

Floats = npt.NDArray[np.float64]

MACHINES = ("h200", "spread-7", "spread-22", "one-slow")
"""Bundled: equal devices, two spreads, one of eight at two thirds of the speed; repeated, node after node."""
PHASE_LOADS = {
    "prefill": ("lognormal", "zipf-0.7", "zipf-1.0", "zipf-1.2", "power-law"),
    "decode": ("lognormal", "zipf-1.0"),
}
PHASES = {"prefill": 1024, "decode": 64}
"""Tokens of each rank in a step."""
DRIFT_SIGMA = 0.3
"""Of the logarithm of each expert's load, from one profile to the next: an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model's MoE layers, with the shape that its cost curves are filed under."""

    name: str
    layers: int
    experts: int
    top_k: int
    shape: Shape
    ranks: tuple[int, ...]


def _model(name: str, layers: int, experts: int, top_k: int, sizes: tuple[int, int, str], *ranks: int) -> Model:
    hidden, intermediate, dtype = sizes
    shape = Shape(hidden=hidden, intermediate=intermediate, dtype=dtype)
    return Model(name=name, layers=layers, experts=experts, top_k=top_k, shape=shape, ranks=ranks)


MODELS = (
    _model("DeepSeek-V3", 58, 256, 8, (7168, 2048, "float8_e4m3fn"), 8, 16, 32, 64),
    _model("Qwen3-235B", 94, 128, 8, (4096, 1536, "bfloat16"), 8, 16, 32, 64),
    _model("GPT-OSS-120B", 36, 128, 4, (2880, 2880, "mxfp4"), 8, 16, 32, 64),
    _model("Mixtral-8x7B", 32, 8, 2, (4096, 14336, "bfloat16"), 4, 8),
)
TINY = _model("tiny-moe, recorded", 6, 32, 4, (2048, 768, "bfloat16"), 4, 8)
"""The bundled model's routing, with the experts of Qwen3-30B-A3B."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """``load_LE``: tokens of each expert in a step. Every rank has one slot to spare."""

    model: Model
    machine: str
    load: str
    phase: str
    costs: RankCosts
    load_LE: Floats

    @property
    def num_ranks(self) -> int:
        return self.costs.num_ranks

    @property
    def slots_per_rank(self) -> int:
        return self.model.experts // self.num_ranks + 1

    @property
    def name(self) -> str:
        return f"{self.model.layers} x {self.model.experts}, {self.num_ranks} ranks, {self.machine}, {self.load}, {self.phase}"


def cases(recorded_LE: Floats, *, seed: int = 0) -> Iterator[Case]:
    """All of them, in a fixed order."""
    for model in (*MODELS, TINY):
        for ranks in model.ranks:
            for machine in MACHINES:
                for phase, loads in PHASE_LOADS.items():
                    for load in loads if model is not TINY else ("recorded",):
                        yield case_of(model, ranks, machine, load, phase, recorded_LE=recorded_LE, seed=seed)


def case_of(
    model: Model, ranks: int, machine: str, load: str, phase: str, *, recorded_LE: Floats | None = None, seed: int = 0
) -> Case:
    """One case; the same seed gives the same loads whatever the machine and phase."""
    if load == "recorded":
        assert recorded_LE is not None, "recorded loads are given"
        share_LE = recorded_LE / recorded_LE.sum(axis=1, keepdims=True)
    else:
        share_LE = shares(load, model.layers, model.experts, np.random.default_rng(seed))
    return Case(
        model=model,
        machine=machine,
        load=load,
        phase=phase,
        costs=RankCosts.of_machine(_of_ranks(find_machine(machine), ranks), ranks=ranks, shape=model.shape),
        load_LE=share_LE * (PHASES[phase] * ranks * model.top_k),
    )


def _of_ranks(machine: Machine, ranks: int) -> Machine:
    """The last devices of a machine where there are fewer ranks: the slowest are among them."""
    return replace(machine, devices=machine.devices[-ranks:], links=())


def shares(load: str, layers: int, experts: int, rng: np.random.Generator) -> Floats:
    """Each expert's share of a layer's tokens, hot experts anywhere. Shape (L, E)."""
    if load == "lognormal":
        raw_LE = rng.lognormal(0.0, 1.0, (layers, experts))
    elif load == "power-law":
        raw_LE = rng.pareto(1.2, (layers, experts)) + 1.0
    else:
        steepness = float(load.removeprefix("zipf-"))
        ranked_E = np.arange(1, experts + 1) ** -steepness
        raw_LE = np.stack([rng.permutation(ranked_E) for _ in range(layers)])
    return np.asarray(raw_LE / raw_LE.sum(axis=1, keepdims=True))


def drifted(load_LE: Floats, *, sigma: float = DRIFT_SIGMA, seed: int = 1) -> Floats:
    """Each expert's load times a lognormal factor, the layer's tokens kept."""
    after_LE = load_LE * np.random.default_rng(seed).lognormal(0.0, sigma, load_LE.shape)
    return np.asarray(after_LE * (load_LE.sum(axis=1) / after_LE.sum(axis=1))[:, None])
