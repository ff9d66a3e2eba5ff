"""What balancing each step did, pass by pass and layer by layer: imbalance before and after, guesses, replicas, what it took.

Pure: numbers of all ranks in, a frozen summary out, which can be joined to that of the passes before. Letters: R ranks, P
passes, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poise.report.of_passes import Floats, OfPasses, over_mean, spread
from poise.units import format_bytes, format_s

SUMMED = (
    "own_pairs",
    "guessed_wrong",
    "replicas_planned",
    "replicas_used",
    "replica_bytes",
    "aux_s",
    "learnt_steps",
    "learnt_late",
)
"""Over ranks."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepFigures(OfPasses):
    """By pass (sums over layers and ranks, means of imbalances) and by layer (means over passes of sums over ranks).

    ``home_imbalance``: of (token, expert) pairs, had each rank computed its experts at home alone; ``imbalance``: as it was.
    ``own_pairs``, of which ``guessed_wrong`` were predicted for other experts. ``replicas_planned``, ``replicas_used``: those
    between came too late, or not at all. ``replica_bytes``: of all that came. ``declined``: layers in which nothing paid;
    ``late``: in which no plan was there in time.
    ``exposed_s``: predicting, planning, dividing, and the message of counts: what passes are longer for it, mean over ranks;
    ``exposed_most_s``: of the rank that took longest in each layer, for which the others wait.
    ``aux_s``: processor time of the auxiliary threads. ``rested``: layers in which nothing was predicted or planned, as that
    would have cost more than it brings. ``learnt_steps`` of all ranks' predictors, of which ``learnt_late`` ended when nobody
    waited any more; ``learnt_s``: mean over ranks.
    """

    home_imbalance_P: Floats
    imbalance_P: Floats
    own_pairs_P: Floats
    guessed_wrong_P: Floats
    replicas_planned_P: Floats
    replicas_used_P: Floats
    replica_bytes_P: Floats
    declined_P: Floats
    late_P: Floats
    exposed_s_P: Floats
    exposed_most_s_P: Floats
    aux_s_P: Floats
    rested_P: Floats
    learnt_steps_P: Floats
    learnt_late_P: Floats
    learnt_s_P: Floats
    home_imbalance_L: Floats
    imbalance_L: Floats
    own_pairs_L: Floats
    guessed_wrong_L: Floats
    replicas_planned_L: Floats
    replicas_used_L: Floats
    replica_bytes_L: Floats
    declined_L: Floats
    late_L: Floats
    exposed_s_L: Floats
    exposed_most_s_L: Floats
    aux_s_L: Floats
    rested_L: Floats
    learnt_steps_L: Floats
    learnt_late_L: Floats
    learnt_s_L: Floats

    def to_json(self) -> dict[str, Any]:
        """For machines: a summary, then by layer and by pass."""
        return {
            "passes": self.passes,
            "home_imbalance": spread(self.home_imbalance_P),
            "imbalance": spread(self.imbalance_P),
            "guessed_wrong_frac": _share(self.guessed_wrong_P, self.own_pairs_P),
            "replicas_planned": float(self.replicas_planned_P.sum()),
            "replicas_used": float(self.replicas_used_P.sum()),
            "replica_bytes": float(self.replica_bytes_P.sum()),
            "declined": float(self.declined_P.sum()),
            "late": float(self.late_P.sum()),
            "rested_passes": int((self.rested_P == len(self.rested_L)).sum()),
            "rested_layers": float(self.rested_P.sum()),
            "exposed_frac": _share(self.exposed_s_P, self.pass_s_P),
            "exposed_most_frac": _share(self.exposed_most_s_P, self.pass_s_P),
            "aux_s": float(self.aux_s_P.sum()),
            "learnt_steps": float(self.learnt_steps_P.sum()),
            "learnt_late": float(self.learnt_late_P.sum()),
            "learnt_frac": _share(self.learnt_s_P, self.pass_s_P),
            "layers": self.table("_L"),
            "steps": self.table("_P"),
        }

    def lines(self, predictor: str) -> list[str]:
        """For people: how even the steps became, by whose predictions, with how many replicas, and for how much."""
        planned, used = self.replicas_planned_P.sum(), self.replicas_used_P.sum()
        rested, layers = self.rested_P.sum(), self.passes * len(self.rested_L)
        late = f", in {self.late_P.sum():.0f} the plan came too late" if self.late_P.any() else ""
        rests = f"; it rested in {rested:.0f} of {layers} layers, where it costs more than it brings" if rested else ""
        return [
            f"steps balanced: tokens, most of a rank over the mean, {self.home_imbalance_P.mean():.2f} with experts at home, "
            f"{self.imbalance_P.mean():.2f} with replicas",
            f"predicted by {predictor}: {1 - _share(self.guessed_wrong_P, self.own_pairs_P):.0%} of the tokens for the experts "
            f"that they went to{self._learnt()}",
            f"replicas: {used:.0f} used, {planned - used:.0f} late, {format_bytes(float(self.replica_bytes_P.sum()))} came; "
            f"in {self.declined_P.sum():.0f} of {layers - rested:.0f} layers none paid{late}",
            f"cost of it: {_share(self.exposed_s_P, self.pass_s_P):.1%} of the passes, and "
            f"{format_s(float(self.aux_s_P.sum()))} of processor time aside on all ranks{rests}",
        ]

    def _learnt(self) -> str:
        """What the predictors have learnt meanwhile."""
        steps, late = self.learnt_steps_P.sum(), self.learnt_late_P.sum()
        if not steps:
            return ""
        return (
            f"; {steps:.0f} steps of learning meanwhile, {_share(self.learnt_s_P, self.pass_s_P):.1%} of the time, "
            f"{late:.0f} of them longer than the wait"
        )


def step_figures_of(layer: Mapping[str, Floats], pass_s_RP: Floats) -> StepFigures:
    """``layer``: by name of a field of ``parallel.moe_layer.LayerRecord``, its value of each rank, pass and layer (R, P, L)."""
    sums_PL = {name: layer[name].sum(axis=0) for name in SUMMED}
    sums_PL |= {name: layer[name].max(axis=0) for name in ("declined", "late", "rested")}
    sums_PL["exposed_s"] = layer["balance_s"].mean(axis=0) + layer["counts_s"].min(axis=0)
    sums_PL["exposed_most_s"] = layer["balance_s"].max(axis=0) + layer["counts_s"].min(axis=0)
    sums_PL["learnt_s"] = layer["learnt_s"].mean(axis=0)
    home_PL, now_PL = over_mean(layer["home_pairs"]), over_mean(layer["routed_tokens"])
    return StepFigures(
        pass_s_P=pass_s_RP.max(axis=0),
        home_imbalance_P=home_PL.mean(axis=1),
        imbalance_P=now_PL.mean(axis=1),
        home_imbalance_L=home_PL.mean(axis=0),
        imbalance_L=now_PL.mean(axis=0),
        **{f"{name}_P": values_PL.sum(axis=1) for name, values_PL in sums_PL.items()},
        **{f"{name}_L": values_PL.mean(axis=0) for name, values_PL in sums_PL.items()},
    )


def _share(part: Floats, whole: Floats) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else 0.0
