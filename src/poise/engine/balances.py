"""The names of ``--balance``: how experts are placed while ranks run, and how each step is balanced (decision 056)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from poise.engine.vibe import Vibe
from poise.errors import UsageError
from poise.parallel.step_options import StepOptions
from poise.plan.rebalance import Eplb, Rebalance

AUTO = "auto"
REDUNDANT_SLOTS = 2
"""Of each rank and layer, where experts move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Balances:
    """``policy``: moves experts now and then; ``steps``: brings replicas for each step. None: nobody does.

    ``reason``: why it is these, for people.
    """

    policy: Rebalance | None = None
    steps: StepOptions | None = None
    reason: str = "as asked for"

    @classmethod
    def of(
        cls, name: str, policy: Rebalance | None, steps: StepOptions | None, *, num_ranks: int, device: str
    ) -> Balances:
        """Those of ``BALANCES``, with those given in their place; ``AUTO``: those given, else as ranks and device want it.

        ``device``: where ranks compute, as torch names the kind. Raises UsageError.
        """
        if name not in (AUTO, *BALANCES):
            raise UsageError(f"balance {name!r} is not supported; choose one of {', '.join((AUTO, *BALANCES))}")
        if name == AUTO and policy is None and steps is None:
            return _automatic(num_ranks=num_ranks, device=device)
        named = BALANCES.get(name, cls())
        return replace(named, policy=policy or named.policy, steps=steps or named.steps)

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


BALANCES: Mapping[str, Balances] = MappingProxyType(
    {
        "static": Balances(),
        "eplb": Balances(policy=Eplb()),
        "vibe": Balances(policy=Vibe()),
        "probe": Balances(steps=StepOptions()),
        "probe+vibe": Balances(policy=Vibe(), steps=StepOptions()),
    }
)


def _automatic(*, num_ranks: int, device: str) -> Balances:
    if num_ranks == 1:
        return Balances(reason="one rank has all experts")
    if device == "cuda":
        return Balances(reason="auto on GPUs, where replicas do not pay yet; probe can be asked for")
    return Balances(steps=StepOptions(), reason="auto: replicas of hot experts come for each step")
