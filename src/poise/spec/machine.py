"""What a machine is, in numbers: devices with cost curves, links between them, and the tiers that weights come from.

``Machine.load`` and ``save`` are the JSON format ``machine.json`` (version 1). Every rule about a value is checked where
the object is made, so a machine from a file and one from Python obey the same ones. Evaluating curves is ``poise.cost``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from poise.errors import MachineError
from poise.spec.curve import Curve, curve_from
from poise.spec.fields import Fields
from poise.spec.rules import require, require_distinct, require_positive
from poise.spec.whole_file import write_whole

VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Something that computes. All times of its curves are divided by ``speed``."""

    name: str
    memory_bytes: int
    speed: float = 1.0
    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a text")
        require(self.memory_bytes >= 1, "memory_bytes", self.memory_bytes, "at least 1")
        require_positive(self.speed, "speed")
        require_distinct(
            "curves", ((c.kind, str(c.shape), c.context_tokens or 0, c.row_tokens or 0) for c in self.curves)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A way for bytes from one device or tier to another; one direction."""

    source: str
    target: str
    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self.bytes_per_s, "bytes_per_s")
        require(math.isfinite(self.latency_s) and self.latency_s >= 0, "latency_s", self.latency_s, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Where weights lie when they are not on a device: ``"dram"`` (rate of a copy in memory), ``"disk"`` (of our reader)."""

    name: str
    capacity_bytes: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a text")
        require(self.capacity_bytes >= 1, "capacity_bytes", self.capacity_bytes, "at least 1")
        require_positive(self.bytes_per_s, "bytes_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What the figures were measured on and with."""

    date: str
    cpu: str
    threads: int
    torch: str
    poise: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Devices, links and tiers. ``measured`` is None for a machine that was written by hand or fitted to others' figures;
    ``source`` then says whose."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    tiers: tuple[Tier, ...] = ()
    measured: Provenance | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.devices:
            raise MachineError("a machine needs at least one device")
        places = [device.name for device in self.devices] + [tier.name for tier in self.tiers]
        require_distinct("devices or tiers", places)
        require_distinct("links", ((link.source, link.target) for link in self.links))
        for link in self.links:
            for end in (link.source, link.target):
                require(end in places, "a link's end", end, f"one of {', '.join(places)}")

    def device(self, name: str) -> Device:
        """Raises MachineError if there is none of that name."""
        return _named({device.name: device for device in self.devices}, name, "device")

    def tier(self, name: str) -> Tier:
        """Raises MachineError if there is none of that name."""
        return _named({tier.name: tier for tier in self.tiers}, name, "tier")

    def link(self, source: str, target: str) -> Link:
        """Raises MachineError if no link goes from ``source`` to ``target``."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        known = ", ".join(f"{link.source} to {link.target}" for link in self.links) or "none"
        raise MachineError(f"no link from {source!r} to {target!r}; the machine has: {known}")

    def to_json(self) -> dict[str, Any]:
        """What the file holds; fields that are None are left out."""
        content: dict[str, Any] = {"version": VERSION, **_without_none(asdict(self))}
        for device in content["devices"]:
            for curve in device["curves"]:
                points = [[point["tokens"], point["active"], point["seconds"]] for point in curve.pop("points")]
                curve.update({"points": points} if points else {})
        return content

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises MachineError if it cannot be written."""
        try:
            write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")
        except OSError as error:
            raise MachineError(f"{path} cannot be written ({error.strerror}); name another file") from None

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Raises MachineError, one line that names the place and the rule, for anything but a machine of version 1."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise MachineError(
                f"machine file {path} cannot be read ({error.strerror}); `poise profile --output {path}` writes one"
            ) from None
        except (ValueError, RecursionError):
            raise MachineError(f"machine file {path} is not JSON; write it with `poise profile --output`") from None
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: object, where: str = "machine") -> Machine:
        """The machine that ``to_json`` gives. ``where`` begins the message of an error."""
        fields = Fields(content, where, MachineError)
        version = fields.whole("version")
        if version != VERSION:
            raise MachineError(f"{where} is of version {version}; this Poise reads version {VERSION}: profile anew")
        try:
            machine = cls(
                devices=fields.many("devices", _device),
                links=fields.many("links", _link),
                tiers=fields.many("tiers", _tier),
                measured=fields.one("measured", _provenance) if fields.has("measured") else None,
                source=fields.text("source") if fields.has("source") else None,
            )
        except MachineError as error:
            raise error if str(error).startswith(where) else MachineError(f"{where}: {error}") from None
        fields.end()
        return machine


def _device(fields: Fields) -> Device:
    return Device(
        name=fields.text("name"),
        memory_bytes=fields.whole("memory_bytes"),
        speed=fields.number("speed"),
        curves=fields.many("curves", curve_from),
    )


def _link(fields: Fields) -> Link:
    return Link(
        source=fields.text("source"),
        target=fields.text("target"),
        bytes_per_s=fields.number("bytes_per_s"),
        latency_s=fields.number("latency_s"),
    )


def _tier(fields: Fields) -> Tier:
    return Tier(
        name=fields.text("name"),
        capacity_bytes=fields.whole("capacity_bytes"),
        bytes_per_s=fields.number("bytes_per_s"),
    )


def _provenance(fields: Fields) -> Provenance:
    return Provenance(
        date=fields.text("date"),
        cpu=fields.text("cpu"),
        threads=fields.whole("threads"),
        torch=fields.text("torch"),
        poise=fields.text("poise"),
    )


def _named(items: Mapping[str, T], name: str, what: str) -> T:
    if name not in items:
        raise MachineError(f"no {what} {name!r}; the machine has: {', '.join(items) or 'none'}")
    return items[name]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
