"""What a MoE layer costs on each rank of an expert-parallel group: T_r(tokens, active experts), from a machine's curves.

``tokens`` are token-expert assignments on the rank in one step; ``active`` how many of its slots get at least one token.
Letters: L layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from poise.cost.experts import ExpertCurve
from poise.cost.lookup import expert_curve
from poise.errors import MachineError
from poise.spec.curve import Shape
from poise.spec.machine import Device, Machine

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankCosts:
    """``curves``: the distinct ones; rank r has curve ``curve_R[r]`` and takes 1 / ``speed_R[r]`` of its time."""

    curves: tuple[ExpertCurve, ...]
    curve_R: Ints
    speed_R: Floats

    @property
    def num_ranks(self) -> int:
        return len(self.curve_R)

    @property
    def alike(self) -> bool:
        """Whether every rank takes the same time for the same work."""
        return len(self.curves) == 1 and bool((self.speed_R == self.speed_R[0]).all())

    def seconds_LR(self, tokens_LR: Floats, active_LR: Floats) -> Floats:
        """Time of each rank for its tokens over its active experts (both may be fractions); no tokens, no time."""
        seconds_LR = np.zeros(tokens_LR.shape)
        active_LR = np.where(active_LR > 0, active_LR, 1.0)
        for index, curve in enumerate(self.curves):
            ranks = self.curve_R == index
            seconds_LR[:, ranks] = curve.seconds(tokens_LR[:, ranks], active_LR[:, ranks])
        return np.asarray(seconds_LR / self.speed_R)

    @classmethod
    def of_machine(cls, machine: Machine, *, ranks: int | None = None, shape: Shape | None = None) -> RankCosts:
        """One rank on each device, in order; a machine of fewer devices is repeated, node after node.

        ``shape``: of the experts; None: the only one that the machine has. Raises MachineError where ``ranks`` is no
        multiple of the devices, or where a device lacks the curve.
        """
        devices = machine.devices
        count = len(devices) if ranks is None else ranks
        if count < 1 or count % len(devices):
            raise MachineError(
                f"{count} ranks on a machine of {len(devices)} devices; give a multiple of {len(devices)}, "
                "or a machine with a device for each rank"
            )
        chosen = only_expert_shape(machine) if shape is None else shape
        parts = [_curve_apart(device, chosen) for device in devices]
        keys = list(dict.fromkeys(key for key, _ in parts))
        curves = dict(parts)
        repeats = count // len(devices)
        return cls(
            curves=tuple(curves[key] for key in keys),
            curve_R=np.tile([keys.index(key) for key, _ in parts], repeats),
            speed_R=np.tile([device.speed for device in devices], repeats),
        )

    @classmethod
    def of_curves(cls, curves: Sequence[ExpertCurve], speed_R: npt.ArrayLike | None = None) -> RankCosts:
        """A curve for each rank, all of the given speed (1 where there is none)."""
        speeds = np.ones(len(curves)) if speed_R is None else np.asarray(speed_R, dtype=float)
        distinct = list(dict.fromkeys(curves))
        return cls(curves=tuple(distinct), curve_R=np.array([distinct.index(one) for one in curves]), speed_R=speeds)


def only_expert_shape(machine: Machine) -> Shape:
    """The one shape of experts that the first device has a curve for. Raises MachineError if there is none, or more."""
    shapes = [curve.shape for curve in machine.devices[0].curves if curve.kind == "expert"]
    if len(shapes) != 1:
        known = ", ".join(str(shape) for shape in shapes) or "none"
        raise MachineError(f"the machine has expert curves for: {known}; say which shape to use")
    return shapes[0]


def _curve_apart(device: Device, shape: Shape) -> tuple[object, ExpertCurve]:
    """The device's curve at speed 1, and what tells it from others."""
    found = [curve for curve in device.curves if curve.kind == "expert" and curve.shape == shape]
    return tuple(found), expert_curve(replace(device, speed=1.0), shape)
