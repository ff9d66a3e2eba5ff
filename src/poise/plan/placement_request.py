"""What a placement is asked for, checked: loads, slots, the current placement, nodes and groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from poise.errors import PlacementError
from poise.plan.expert_loads import Floats, Ints, copies_of
from poise.plan.layer_state import Limits
from poise.spec.curve import Shape

_ITEM_BYTES = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "fp8": 1, "int8": 1, "int4": 0.5, "mxfp4": 0.53125}
)


MOST_RANKS = 512
"""More are refused: there a plan of 58 layers takes half a minute."""
LEAST_GAIN_FRAC = 5e-4
"""Of the layer's time now: what a move must save where there is no limit on moves (decision 035)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementRequest:
    """See ``poise.plan.placement.place_experts`` for the fields. Raises PlacementError where they do not go together."""

    load_LE: Floats
    num_ranks: int
    slots_per_rank: int
    steps: float = 1
    current_LS: npt.NDArray[np.generic] | None = None
    max_moves: int | None = None
    least_gain_frac: float = LEAST_GAIN_FRAC
    ranks_per_node: int | None = None
    expert_groups: int | None = None

    def __post_init__(self) -> None:
        load = self.load_LE
        _require(load.ndim == 2 and load.size > 0, f"the load has the shape {load.shape}; it must be layers x experts")
        _require(bool(np.isfinite(load).all() and (load >= 0).all()), "a load is negative or not finite; count tokens")
        _require(math.isfinite(self.steps) and self.steps > 0, f"steps is {self.steps}; it must be above 0")
        _require(1 <= self.num_ranks <= MOST_RANKS, f"{self.num_ranks} ranks; give from 1 to {MOST_RANKS}")
        _require(self.slots_per_rank >= 1, f"slots_per_rank is {self.slots_per_rank}; it must be at least 1")
        fewest = -(-self.num_experts // self.num_ranks)
        _require(
            self.slots_per_rank >= fewest,
            f"{self.num_experts} experts do not fit into {self.num_ranks} ranks of {self.slots_per_rank} slots; "
            f"give at least {fewest} slots per rank",
        )
        _require(self.max_moves is None or self.max_moves >= 0, f"max_moves is {self.max_moves}; it must be 0 or more")
        _require(
            0 <= self.least_gain_frac < 1, f"least_gain_frac is {self.least_gain_frac}; it must be from 0 to below 1"
        )
        if self.current_LS is not None:
            self._check_current(self.current_LS)
        elif self.max_moves is not None:
            raise PlacementError("max_moves needs the current placement; give current as well")
        self._check_nodes()

    @property
    def num_experts(self) -> int:
        return int(self.load_LE.shape[1])

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def step_load_LE(self) -> Floats:
        """Tokens of each expert in one step."""
        return np.asarray(self.load_LE / self.steps)

    @property
    def current(self) -> Ints | None:
        return None if self.current_LS is None else self.current_LS.astype(np.int64)

    @property
    def node_ranks(self) -> int:
        """Ranks of a node; all of them where nothing is said."""
        return self.num_ranks if self.ranks_per_node is None else self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.node_ranks

    @property
    def group_nodes(self) -> int:
        """Nodes that experts must stay within; 1 where they have no groups."""
        return 1 if self.expert_groups is None else self.num_nodes

    @property
    def limits(self) -> Limits:
        """For the search: copies of an expert share a rank only where slots force them to."""
        return Limits(
            slots_per_rank=self.slots_per_rank,
            ranks_per_node=self.num_ranks // self.group_nodes,
            most_alike=-(-self.slots_per_rank * self.group_nodes // self.num_experts),
        )

    def current_nodes(self) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """(the node of each expert in the current placement, shape (L, E); the layers that keep groups on nodes)."""
        current_LS = self.current
        assert current_LS is not None, "there is a current placement"
        node_LE = np.zeros(self.load_LE.shape, dtype=np.int64)
        node_LS = np.broadcast_to(np.arange(self.num_slots) * self.group_nodes // self.num_slots, current_LS.shape)
        np.put_along_axis(node_LE, current_LS, node_LS, axis=1)
        together_L = (np.take_along_axis(node_LE, current_LS, axis=1) == node_LS).all(axis=1)
        by_group_LGE = node_LE.reshape(len(node_LE), self.expert_groups or 1, -1)
        return node_LE, together_L & (by_group_LGE == by_group_LGE[:, :, :1]).all(axis=(1, 2))

    def _check_current(self, current: npt.NDArray[np.generic]) -> None:
        shape = (len(self.load_LE), self.num_slots)
        _require(
            current.shape == shape and np.issubdtype(current.dtype, np.integer),
            f"the current placement is {current.dtype} of shape {current.shape}; "
            f"it must be whole numbers, layers x slots: {shape}",
        )
        experts = current.astype(np.int64)
        inside = bool((experts >= 0).all() and (experts < self.num_experts).all())
        _require(inside, f"the current placement names experts outside 0 to {self.num_experts - 1}")
        missing = np.argwhere(copies_of(experts, self.num_experts) == 0)
        if len(missing):
            layer, expert = missing[0].tolist()
            raise PlacementError(
                f"the current placement has no slot for expert {expert} of layer {layer} (of those given)"
            )

    def _check_nodes(self) -> None:
        per_node = self.ranks_per_node
        _require(
            per_node is None or (per_node >= 1 and self.num_ranks % per_node == 0),
            f"ranks_per_node is {per_node}; it must divide the {self.num_ranks} ranks",
        )
        groups = self.expert_groups
        if groups is None:
            return
        _require(per_node is not None, "expert_groups needs ranks_per_node; give it, or leave expert_groups out")
        _require(
            groups >= 1 and self.num_experts % groups == 0 and groups % self.num_nodes == 0,
            f"expert_groups is {groups}; it must divide the {self.num_experts} experts and be a multiple of the "
            f"{self.num_nodes} nodes; leave it out to place without groups",
        )


def bytes_of(shape: Shape) -> int:
    """Of one expert with a gate, an up and a down matrix. Raises PlacementError for a dtype whose size is not known."""
    if shape.dtype not in _ITEM_BYTES:
        raise PlacementError(f"the size of dtype {shape.dtype!r} is not known; give expert_bytes")
    return round(3 * shape.hidden * shape.intermediate * _ITEM_BYTES[shape.dtype])


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise PlacementError(problem)
