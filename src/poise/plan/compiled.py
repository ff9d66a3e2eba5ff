"""Compiles the planners' inner loops with numba, and keeps the machine code for the next process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` as machine code, made at its first call. Kept beside the source, or in the user's cache directory.

    Where neither can be written, every process compiles anew.
    """
    return _compiled(function, counts_references=True)


def borrowing(function: Callable[P, T]) -> Callable[P, T]:
    """The same for a function that makes no arrays: it borrows its caller's, so that no references are counted. Each count is
    an atomic operation, and a compiled function of a dozen arrays has a hundred of them."""
    return _compiled(function, counts_references=False)


def _compiled(function: Callable[P, T], *, counts_references: bool) -> Callable[P, T]:
    # Numba's cache sees changes of a function's own file only, and not of what it calls elsewhere: the name tells them apart.
    function.__qualname__ += f".{_digest_of(Path(inspect.getfile(function)).parent)}"
    options = {"nogil": True} if counts_references else {"nogil": True, "_nrt": False}
    try:
        return cast(Callable[P, T], numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba found no place for its cache
        return cast(Callable[P, T], numba.njit(**options)(function))


@functools.cache
def arithmetic() -> int:
    """A number for what the last bit of a float may depend on: processes with the same one plan alike from the same numbers."""
    parts = (np.__version__, numba.__version__, llvmlite.binding.get_host_cpu_name(), platform.libc_ver())
    return zlib.crc32(repr(parts).encode())


@functools.cache
def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
