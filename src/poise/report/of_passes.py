"""Figures of passes one after the other: fields whose names end in the letters of their axes (R ranks, P passes, L MoE layers).

``..._P`` and ``..._RP`` are by pass, ``..._L`` means over passes, all others sums over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OfPasses:
    """``pass_s_P``: what each took."""

    pass_s_P: Floats

    @property
    def passes(self) -> int:
        return len(self.pass_s_P)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of all parts' passes."""
        weight_N = [part.passes for part in parts]
        values: dict[str, Any] = {}
        for field in fields(cls):
            each = [getattr(part, field.name) for part in parts]
            if field.name.endswith(("_P", "_RP")):
                values[field.name] = np.concatenate(each, axis=-1)
            elif field.name.endswith("_L"):
                values[field.name] = np.average(each, axis=0, weights=weight_N)
            else:
                values[field.name] = np.sum(each, axis=0)
        return cls(**values)

    def table(self, axes: str) -> dict[str, list[Any]]:
        """Fields that end in ``axes``, as lists, by name without it."""
        names = [field.name for field in fields(self) if field.name.endswith(axes)]
        return {name.removesuffix(axes): getattr(self, name).tolist() for name in names}


def spread(values: Floats) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
    }


def over_mean(values_RPL: Floats) -> Floats:
    """The most of a rank over the mean; 1 where nothing was computed."""
    mean_PL = values_RPL.mean(axis=0)
    ratio_PL: Floats = np.divide(values_RPL.max(axis=0), mean_PL, out=np.ones_like(mean_PL), where=mean_PL > 0)
    return ratio_PL
