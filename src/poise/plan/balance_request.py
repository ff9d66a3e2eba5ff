"""One step's plan for people with a machine file and an engine of their own. Who plans many steps keeps a ``Balancer``.

Letters: R ranks, E experts, S slots of all ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from poise.errors import MachineError, PlacementError
from poise.plan.balance import BalancePlan, Balancer, Strategy
from poise.plan.expert_loads import Floats
from poise.plan.rank_costs import RankCosts
from poise.spec.curve import Shape
from poise.spec.machine import Machine


def balance_step(
    counts_RE: npt.ArrayLike,
    slot_to_expert_S: npt.ArrayLike,
    machine: Machine,
    *,
    expert_bytes: float,
    token_bytes: float,
    window_s_R: npt.ArrayLike,
    replica_slots: int = 3,
    unique_tokens_RR: npt.ArrayLike | None = None,
    shape: Shape | None = None,
    strategy: Strategy = "quota",
) -> BalancePlan:
    """Replicas and assignment for one layer of one step; rank r runs on device r, machines of fewer devices are repeated.

    ``counts_RE``: token-expert assignments by the rank they are born on. ``slot_to_expert_S``: experts at home, rank by rank.
    ``window_s_R``: seconds for which each rank's link is free for experts; one figure for all will do. ``unique_tokens_RR``:
    tokens that go from rank (row) to rank (column) with experts at home, each counted once; None: as many as assignments.
    ``shape``: of the experts; None: the only one that the machine has curves for. A rank's link is its slowest one.
    ``strategy``: ``"quota"``, or ``"greedy"``, the paper's.
    Raises MachineError, PlacementError.
    """
    counts = np.asarray(counts_RE)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise PlacementError(
            "counts_RE must be whole numbers, 0 or more, a row for each rank, a column for each expert"
        )
    ranks, experts = counts.shape
    costs = RankCosts.of_machine(machine, ranks=ranks, shape=shape)
    balancer = Balancer(
        costs,
        slot_to_expert_S,
        num_experts=experts,
        link_bytes_per_s_R=_links(machine, ranks),
        token_bytes=token_bytes,
        expert_bytes=expert_bytes,
        most_tokens=float(counts.sum()),
        replica_slots=replica_slots,
        strategy=strategy,
    )
    in_frac_R = out_frac_R = None
    if unique_tokens_RR is not None:
        in_frac_R, out_frac_R = _travelling(
            counts, np.asarray(slot_to_expert_S), np.asarray(unique_tokens_RR, dtype=float)
        )
    window = np.broadcast_to(np.asarray(window_s_R, dtype=float), ranks).copy()
    return balancer.choose_replicas(counts, window, in_frac_R=in_frac_R, out_frac_R=out_frac_R)


def _links(machine: Machine, ranks: int) -> Floats:
    """Bytes a second of each rank's slowest link to or from another device."""
    names = [device.name for device in machine.devices]
    rates = []
    for name in names:
        own = [
            link.bytes_per_s
            for link in machine.links
            if name in (link.source, link.target) and {link.source, link.target} <= set(names)
        ]
        if not own:
            raise MachineError(
                f"the machine has no link between {name!r} and another device; add it to the machine file"
            )
        rates.append(min(own))
    return np.tile(rates, ranks // len(names))


def _travelling(
    counts_RE: npt.NDArray[np.integer], slots_S: npt.NDArray[np.integer], unique_RR: Floats
) -> tuple[Floats, Floats]:
    """Tokens that travel over assignments that do, into and out of each rank, with experts evenly on their homes."""
    ranks, experts = counts_RE.shape
    if unique_RR.shape != (ranks, ranks):
        raise PlacementError(f"unique_tokens_RR is of {unique_RR.shape}; give {ranks} rows and columns, of ranks")
    share_ER = np.zeros((experts, ranks))
    np.add.at(share_ER, (slots_S, np.arange(len(slots_S)) // (len(slots_S) // ranks)), 1.0)
    share_ER /= share_ER.sum(axis=1, keepdims=True)
    away = ~np.eye(ranks, dtype=bool)
    sent_RR, unique_RR = counts_RE @ share_ER * away, unique_RR * away
    fracs = [
        np.clip(
            np.divide(
                unique_RR.sum(axis=axis), sent_RR.sum(axis=axis), where=sent_RR.sum(axis=axis) > 0, out=np.ones(ranks)
            ),
            0.0,
            1.0,
        )
        for axis in (0, 1)
    ]
    return fracs[0], fracs[1]
