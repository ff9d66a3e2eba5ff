"""Machine files of single devices made one, and how far their devices are apart.

Each device or rank is profiled where it is; put side by side, in the order given, they are the machine that placement needs.
No measuring here, and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from poise.cost.lookup import expert_curve
from poise.errors import MachineError
from poise.spec.curve import Curve, Shape
from poise.spec.machine import Device, Link, Machine, Provenance, Tier

FORM_TOKENS = (64, 4096)
"""Where curves in closed form are compared; measured ones are at their own fewest and most tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The experts of one shape at one load: ``tokens`` over ``active`` experts take ``seconds_D`` on each device."""

    shape: Shape
    tokens: int
    active: int
    seconds_D: tuple[float, ...]

    @property
    def over_fastest_D(self) -> tuple[float, ...]:
        """Each device's time over the fastest one's."""
        return tuple(seconds / min(self.seconds_D) for seconds in self.seconds_D)


def merge_machines(machines: Sequence[Machine], names: Sequence[str]) -> Machine:
    """One machine with the devices of all, in order; ``names`` of the files, for messages.

    Devices get their rank as a number where two have one name. Of tiers with one name the slowest rate and the smallest
    capacity are kept. Raises MachineError for machines measured with different threads or versions, or in different shapes.
    """
    assert len(machines) == len(names), "every machine has a name"
    if len(machines) < 2:
        raise MachineError(f"{len(machines)} machine files are given; two or more can be put together")
    _require_alike(machines, names)
    known = [device.name for machine in machines for device in machine.devices]
    is_unique = len(set(known)) == len(known)
    devices: list[Device] = []
    links: list[Link] = []
    for machine in machines:
        new_names = {}
        for device in machine.devices:
            new_names[device.name] = device.name if is_unique else f"{device.name}{len(devices)}"
            devices.append(replace(device, name=new_names[device.name]))
        for link in machine.links:
            source, target = (new_names.get(end, end) for end in (link.source, link.target))
            links.append(replace(link, source=source, target=target))
    return Machine(
        devices=tuple(devices), links=tuple(links), tiers=_tiers(machines), measured=_measured(machines), source=None
    )


def spreads(machine: Machine) -> tuple[Spread, ...]:
    """For each shape of experts that the devices have: how far apart they are at few tokens and at many."""
    found = []
    for curve in machine.devices[0].curves:
        if curve.kind == "expert":
            for tokens, active in _loads(curve):
                each = [expert_curve(device, curve.shape).seconds(tokens, active) for device in machine.devices]
                seconds_D = tuple(float(seconds) for seconds in each)
                found.append(Spread(shape=curve.shape, tokens=tokens, active=active, seconds_D=seconds_D))
    return tuple(found)


def _loads(curve: Curve) -> tuple[tuple[int, int], ...]:
    """(tokens, active experts) to compare at."""
    if curve.closed_form is not None:
        return tuple((tokens, 1) for tokens in FORM_TOKENS)
    fewest = min(point.active for point in curve.points)
    tokens = [point.tokens for point in curve.points if point.active == fewest]
    return tuple((count, fewest) for count in dict.fromkeys((min(tokens), max(tokens))))


def _require_alike(machines: Sequence[Machine], names: Sequence[str]) -> None:
    first = machines[0]
    for machine, name in zip(machines, names, strict=True):
        for device in machine.devices:
            shapes = _shapes(device)
            if shapes != _shapes(first.devices[0]):
                one = sorted(map(str, shapes ^ _shapes(first.devices[0])))[0]
                raise MachineError(
                    f"only one of {names[0]} and {name} has experts of {one}; profile the same model for both"
                )
        if (machine.measured is None) != (first.measured is None):
            raise MachineError(f"only one of {names[0]} and {name} was measured; put measured ones together")
        if machine.measured is None or first.measured is None:
            continue
        for fact in ("threads", "torch", "poise"):
            here, there = getattr(first.measured, fact), getattr(machine.measured, fact)
            if here != there:
                raise MachineError(f"{names[0]} was measured with {fact} {here} and {name} with {there}; profile anew")


def _shapes(device: Device) -> set[Shape]:
    return {curve.shape for curve in device.curves if curve.kind == "expert"}


def _tiers(machines: Sequence[Machine]) -> tuple[Tier, ...]:
    by_name: dict[str, Tier] = {}
    for machine in machines:
        for tier in machine.tiers:
            other = by_name.get(tier.name, tier)
            by_name[tier.name] = Tier(
                name=tier.name,
                capacity_bytes=min(tier.capacity_bytes, other.capacity_bytes),
                bytes_per_s=min(tier.bytes_per_s, other.bytes_per_s),
            )
    return tuple(by_name.values())


def _measured(machines: Sequence[Machine]) -> Provenance | None:
    """The first one's, with the processors of all."""
    each = [machine.measured for machine in machines if machine.measured is not None]
    if not each:
        return None
    return replace(each[0], cpu=", ".join(dict.fromkeys(one.cpu for one in each)))
