"""A short measurement for runs without ``--machine``: a few seconds once, then from a file in the user's cache.

The file's name says what was measured and on what: processor, threads, versions, the model's shapes, and the disk. Anything
else there is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import sys
from pathlib import Path

import torch
import transformers

from poise.errors import MachineError
from poise.profile.hardware import cpu_model
from poise.profile.measure import Measurement
from poise.profile.mounts import mount_of
from poise.profile.progress import progress_bar
from poise.profile.run import QUICK, Effort, Profile, profile_machine
from poise.profile.subject import Subject
from poise.spec.machine import VERSION, Machine

logger = logging.getLogger(__name__)

MEASURED_AS = 2
"""To be counted up when the same points come to mean other work, so that none of an earlier count is found. 2: the caches that
attention runs over lie in one place each."""
MAX_SPREAD = 0.3
"""Times that vary by more are those of other programs as much as of the machine: not worth keeping."""


def calibrate(
    subject: Subject, *, effort: Effort = QUICK, cache_folder: Path | None = None, show_progress: bool = True
) -> Machine:
    """The machine as it is for one model: from the cache, or measured in 5 to 10 seconds and put there.

    ``cache_folder``: None is ``$XDG_CACHE_HOME/poise``, else ``~/.cache/poise``. What cannot be read or written there is said
    once, as a warning; so is a machine too busy to be measured, which is not kept. Memory beyond what ``subject`` holds stays
    within about twice ``effort.scratch_bytes``. Standard error is told: a bar on a terminal, else a line. Raises ReadError
    when the disk fails.
    """
    folder = default_cache_folder() if cache_folder is None else cache_folder
    file = folder / f"machine-{machine_fingerprint(subject, effort)}.json"
    if file.exists():
        try:
            return Machine.load(file)
        except MachineError as error:
            logger.warning("%s; measuring anew", error)
    if show_progress and not sys.stderr.isatty():
        print("poise: measuring this machine once, 5 to 10 s", file=sys.stderr, flush=True)
    with progress_bar("Measuring this machine once", shown=show_progress) as on_progress:
        profile = profile_machine([subject], effort, on_progress=on_progress)
    machine, spread = profile.machine, typical_spread(profile)
    if spread > MAX_SPREAD:
        logger.warning(
            "this machine is busy: the times measured of it vary by %.0f %%, so they are used now and not kept",
            100 * spread,
        )
        return machine
    try:
        folder.mkdir(parents=True, exist_ok=True)
        machine.save(file)
    except (OSError, MachineError) as error:
        logger.warning("the measurement of this machine is not kept: %s", error)
    return machine


def typical_spread(profile: Profile) -> float:
    """How far 95 % intervals reach, relative to the time: the median over points run thrice, or the disk's if that is more."""
    points = [_reach(point.time) for point in profile.points if point.time.runs >= 3]
    disk = _reach(profile.disk) if profile.disk.runs >= 2 else 0.0
    return max(statistics.median(points) if points else 0.0, disk)


def _reach(time: Measurement) -> float:
    return max(time.high_s - time.seconds, time.seconds - time.low_s) / time.seconds


def default_cache_folder() -> Path:
    """As the XDG base directory specification says."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "poise"


def machine_fingerprint(subject: Subject, effort: Effort) -> str:
    """Short, and equal only where the same times are to be expected."""
    disk = None
    if subject.sources_LE is not None:
        mount = mount_of(subject.sources_LE[0][0].parts[0].file)
        disk = (mount.source, mount.kind) if mount else None
    facts = [
        VERSION,
        MEASURED_AS,
        cpu_model(),
        torch.get_num_threads(),
        torch.__version__,
        transformers.__version__,
        subject.fingerprint(),
        disk,
        repr(effort),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
