"""Several devices profiled in turn, and put together as one machine. A device alone is measured: the others are idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from poise.profile.devices import clock_of
from poise.profile.merge import merge_machines
from poise.profile.run import Effort, OnProgress, Profile, profile_machine
from poise.profile.subject import Subject


def profile_devices(
    subjects: Sequence[Subject], effort: Effort, devices: Sequence[str], *, on_progress: OnProgress
) -> Profile:
    """Each of ``devices``, named as torch does, by the same code; a profile of one machine with all of them, in order."""
    profiles = []
    for index, name in enumerate(devices):
        report = _part_of(name, index, len(devices), on_progress)
        profiles.append(profile_machine(subjects, effort, on_progress=report, clock=clock_of(name), device=name))
    if len(profiles) == 1:
        return profiles[0]
    machine = merge_machines([profile.machine for profile in profiles], devices)
    points = [
        replace(point, device=device.name)
        for profile, device in zip(profiles, machine.devices, strict=True)
        for point in profile.points
    ]
    notes = [
        f"{device.name}: {note}"
        for profile, device in zip(profiles, machine.devices, strict=True)
        for note in profile.notes
    ]
    slowest = max((profile.disk for profile in profiles), key=lambda disk: disk.seconds)
    return Profile(machine=machine, points=tuple(points), disk=slowest, notes=tuple(notes))


def _part_of(name: str, index: int, count: int, on_progress: OnProgress) -> OnProgress:
    if count == 1:
        return on_progress
    return lambda label, share: on_progress(f"{name} ({index + 1} of {count}): {label}", (index + share) / count)
