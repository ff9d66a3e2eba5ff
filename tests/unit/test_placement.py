"""What a placement is, and what is refused: slots, loads, the current placement, nodes, groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poise.errors import MachineError, PlacementError
from poise.plan.placement import PlacementPlan, place_experts
from poise.spec.curve import ClosedForm, Curve, Shape
from poise.spec.machine import Device, Machine

SHAPE = Shape(hidden=64, intermediate=32, dtype="bfloat16")


def machine_of(*speeds: float, a_s: float = 1e-6, b_s: float = 1e-6, p: float = 1.25) -> Machine:
    curve = Curve(kind="expert", shape=SHAPE, closed_form=ClosedForm(a_s=a_s, b_s=b_s, p=p))
    return Machine(
        devices=tuple(
            Device(name=f"gpu{index}", memory_bytes=1 << 30, speed=speed, curves=(curve,))
            for index, speed in enumerate(speeds)
        )
    )


def place(load_LE: Any, *speeds: float, slots_per_rank: int, **options: Any) -> PlacementPlan:
    return place_experts(load_LE, machine_of(*speeds), slots_per_rank=slots_per_rank, **options)


def test_a_faster_device_gets_more_load() -> None:
    plan = place([[6.0, 5, 4, 3, 2, 1, 1, 1]], 2.0, 1.0, slots_per_rank=4)
    fast, slow = plan.slot_to_expert_LS.reshape(2, 4)
    load = np.array([6, 5, 4, 3, 2, 1, 1, 1])
    assert load[fast].sum() > load[slow].sum()
    assert sorted(plan.slot_to_expert_LS[0]) == list(range(8))
    assert (plan.predicted_s_L >= plan.bound_s_L).all()


def test_layers_without_load_get_a_placement_that_takes_no_time() -> None:
    plan = place(np.zeros((3, 8)), 1.0, 0.5, slots_per_rank=5)
    assert (np.sort(plan.slot_to_expert_LS, axis=1)[:, :1] == 0).all()
    assert (plan.predicted_s_L == 0).all()
    assert (plan.bound_s_L == 0).all()
    assert all(set(row) == set(range(8)) for row in plan.slot_to_expert_LS.tolist())


def test_a_machine_is_repeated_for_more_ranks() -> None:
    assert place(np.ones((1, 8)), 1.0, 0.9, slots_per_rank=2, ranks=4).num_ranks == 4
    with pytest.raises(MachineError, match="3 ranks on a machine of 2 devices; give a multiple of 2"):
        place(np.ones((1, 8)), 1.0, 0.9, slots_per_rank=4, ranks=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_rank": 3}, "8 experts do not fit into 2 ranks of 3 slots; give at least 4"),
        ({"slots_per_rank": 4, "steps": 0}, "steps is 0"),
        ({"slots_per_rank": 4, "max_moves": 3}, "max_moves needs the current placement"),
        ({"slots_per_rank": 4, "current": [[0] * 8]}, "no slot for expert 1 of layer 0"),
        ({"slots_per_rank": 4, "current": [[9] * 8]}, "experts outside 0 to 7"),
        ({"slots_per_rank": 4, "current": [[0]]}, "layers x slots: \\(1, 8\\)"),
        ({"slots_per_rank": 4, "ranks_per_node": 3}, "must divide the 2 ranks"),
        ({"slots_per_rank": 4, "expert_groups": 2}, "expert_groups needs ranks_per_node"),
        ({"slots_per_rank": 4, "expert_groups": 1, "ranks_per_node": 1}, "a multiple of the 2 nodes"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(np.ones((1, 8)), 1.0, 1.0, **options)


@pytest.mark.parametrize("load", [[[1.0, -1.0]], [[1.0, np.nan]], [1.0, 2.0], [[]]])
def test_loads_that_are_no_loads_are_refused(load: Any) -> None:
    with pytest.raises(PlacementError, match="load"):
        place(load, 1.0, 1.0, slots_per_rank=2)
