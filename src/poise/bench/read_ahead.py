"""How far the kernel reads ahead in files of a disk, set for a while: it decides what programs that map their weights read.

Machines come with anything from the kernel's own 128 KiB to several MiB. An expert's matrix is a few MiB, so a long read-ahead
fetches neighbours that nobody asked for: llama.cpp took 6.1 s for a step with 8 MiB and 1.2 s with 128 KiB (decision 019). A
peer deserves its better setting. The setting is the whole machine's: it is put back when the block ends, and only a killed
process leaves it. Direct reads, Poise's, do not go through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poise.profile.mounts import block_device

KERNEL_DEFAULT_KIB = 128


def read_ahead_kib(path: Path) -> int | None:
    """What holds now for files on the disk under ``path``; None where the kernel does not say."""
    setting, _ = _setting(path)
    return None if setting is None else int(setting.read_text())


@contextmanager
def set_read_ahead(path: Path, kib: int | None) -> Iterator[str | None]:
    """``kib`` for files on the disk under ``path`` that are opened within the block. Yields why it could not be set, or None.

    ``kib`` None leaves it as it is.
    """
    if kib is None:
        yield None
        return
    setting, reason = _setting(path)
    if setting is None:
        yield reason
        return
    before = setting.read_text().strip()
    try:
        setting.write_text(str(kib))
    except OSError as error:
        yield f"the read-ahead of {kib} KiB cannot be set ({error.strerror}); run as root"
        return
    try:
        yield None
    finally:
        setting.write_text(before)


def _setting(path: Path) -> tuple[Path | None, str]:
    device, reason = block_device(path)
    setting = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    if device is None or not setting.exists():
        return None, reason or f"{setting} is not there: the read-ahead of the disk under {path} is not known"
    return setting, ""
