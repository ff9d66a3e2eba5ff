"""What stamps a result: the hardware, the versions, the commit, the thread counts, and which limits were enforced.

Facts that say what a figure was measured on, none that says whose machine it was: no host name, user or path.
Imports no torch; it reports torch's thread count when the caller has torch loaded.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import poise
from poise.profile.hardware import cpu_model, memory_bytes

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Facts about one measurement. ``commit`` is None outside a checkout, ``dirty`` says it had uncommitted changes.

    ``threads`` holds the thread variables that are set, and ``torch`` where this process measures and has torch loaded. Then
    ``gpus`` are those that it can use.
    """

    date: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool
    threads: dict[str, int | str]
    limits_enforced: tuple[str, ...]
    limits_missing: tuple[str, ...]
    gpus: tuple[str, ...] = ()


def stamp(
    *,
    limits_enforced: Sequence[str] = (),
    limits_missing: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Stamp:
    """The facts of this machine, now. ``environment`` is that of the measured process; None: of this one."""
    commit, dirty = _commit(Path(poise.__file__).parent)
    return Stamp(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory_bytes(),
        kernel=f"{platform.system()} {platform.release()}",
        versions=_versions(),
        commit=commit,
        dirty=dirty,
        threads=_threads(os.environ) if environment is None else _threads(environment),
        limits_enforced=tuple(limits_enforced),
        limits_missing=tuple(limits_missing),
        gpus=_gpus(),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "poise": poise.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit(directory: Path) -> tuple[str | None, bool]:
    """``(commit, dirty)`` of the checkout around ``directory``; ``(None, False)`` where there is none, or no git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None or _git(directory, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, False  # installed below somebody else's repository
    return commit, bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _threads(environment: Mapping[str, str]) -> dict[str, int | str]:
    threads: dict[str, int | str] = {name: environment[name] for name in _THREAD_VARIABLES if name in environment}
    torch = sys.modules.get("torch")
    if torch is not None and environment is os.environ:
        threads["torch"] = int(torch.get_num_threads())
    return threads


def _gpus() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
