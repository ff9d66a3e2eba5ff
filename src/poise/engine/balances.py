"""The names of ``--balance``: how experts are placed while ranks run, and how each step is balanced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from poise.engine.vibe import Vibe
from poise.errors import UsageError
from poise.parallel.step_options import StepOptions
from poise.plan.rebalance import Eplb, Rebalance

BALANCES: Mapping[str, Rebalance | StepOptions | None] = MappingProxyType(
    {"static": None, "eplb": Eplb(), "vibe": Vibe(), "probe": StepOptions()}
)
REDUNDANT_SLOTS = 2
"""Of each rank and layer, where experts move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Balances:
    """``policy``: moves experts now and then; ``steps``: brings replicas for each step. None: nobody does."""

    policy: Rebalance | None
    steps: StepOptions | None

    @classmethod
    def of(cls, name: str, policy: Rebalance | None, steps: StepOptions | None) -> Balances:
        """Those of ``BALANCES``, or those given in their place. Raises UsageError."""
        if name not in BALANCES:
            raise UsageError(f"balance {name!r} is not supported; choose one of {', '.join(BALANCES)}")
        named = BALANCES[name]
        return cls(
            policy=policy or (None if isinstance(named, StepOptions) else named),
            steps=steps or (named if isinstance(named, StepOptions) else None),
        )

    @property
    def name(self) -> str:
        names = ["probe"] if self.steps is not None else []
        names += [] if self.policy is None else [type(self.policy).__name__.lower()]
        return "+".join(names) or "static"

    @property
    def uses_speed(self) -> bool:
        """Whether measured curves of the ranks are of use."""
        return isinstance(self.policy, Vibe) or self.steps is not None

    @property
    def redundant_slots(self) -> int:
        """As there are unless others are asked for."""
        return 0 if self.policy is None else REDUNDANT_SLOTS

    @property
    def replica_slots(self) -> int:
        """Of each half."""
        return 0 if self.steps is None else self.steps.replica_slots
