"""What the planner calls memory and disk, in words for the user: the device and DRAM, where experts are copied to a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TierNames:
    """``memory``: where it computes. ``below``: where experts come from. ``way``: what brings them. ``there``: in memory;
    ``away``: where caches are that left it."""

    memory: str = "memory"
    below: str = "disk"
    way: str = "disk"
    there: str = "in memory"
    away: str = "on disk"

    def bottleneck(self, which: str) -> str:
        """``disk`` or ``compute``, as a plan has it."""
        return self.way if which == "disk" else which


def tier_names(facts: Mapping[str, Any]) -> TierNames:
    """``facts``: what ``LLM.describe``, or ``engine.facts.model_facts``, says of the model."""
    if "device" not in facts:
        return TierNames()
    in_dram = facts["experts_in_dram"] == facts["experts"]
    return TierNames(
        memory="device",
        below="DRAM" if in_dram else "DRAM, disk",
        way="copies to the device" if in_dram else "copies to the device, or the disk",
        there="on the device",
        away="in DRAM",
    )
