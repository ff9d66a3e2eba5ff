"""Reading into memory: direct where the file system lets us, through the page cache where it does not; memory given back."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from poise.engine.footprint import resident_bytes
from poise.errors import ReadError
from poise.model.arena import Arena
from poise.model.reader import Reader


def wait_until(condition: Callable[[], bool]) -> None:
    """Gives the reader threads time; fails after ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the reader threads did not get there"
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_system_without_direct_reads_works_and_is_said_once(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """procfs refuses O_DIRECT when a file is opened."""
    files = [Path("/proc/version"), Path("/proc/sys/kernel/ostype")][:count]
    contents = [file.read_bytes() for file in files]
    with caplog.at_level(logging.WARNING):
        assert read_with(Reader(files, threads=1), files, [len(content) for content in contents]) == contents
    assert [record.getMessage() for record in caplog.records] == [
        "the file system of /proc/version refuses O_DIRECT; reading through the page cache"
    ]


@pytest.mark.parametrize(
    "count",
    [
        1,
        2,
    ],
)
def test_a_direct_read_that_is_refused_after_opening_falls_back_for_every_file(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory at an odd address stands for a file system or device that takes O_DIRECT and then refuses to read."""
    files = [tmp_path / f"{number}.bin" for number in range(count)]
    contents = [os.urandom(4096) for _ in files]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    reader = Reader(files, threads=1)
    if not reader.is_direct:
        reader.close()
        pytest.skip(f"{tmp_path} does not take O_DIRECT at all")
    with caplog.at_level(logging.WARNING):
        assert read_with(reader, files, [4096] * count) == contents
    assert len(caplog.records) == 1
    assert not reader.is_direct


def test_two_threads_that_are_refused_at_once_on_one_file_both_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real refusal, held back until both threads have had it: the second then finds O_DIRECT turned off already."""
    file, content = tmp_path / "file.bin", os.urandom(8192)
    file.write_bytes(content)
    reader = Reader([file], threads=2)
    if not reader.is_direct:
        reader.close()
        pytest.skip(f"{tmp_path} does not take O_DIRECT at all")
    preadv, both, calls = os.preadv, threading.Barrier(2, timeout=10), itertools.count()

    def refused_together(*arguments: Any) -> int:
        try:
            return preadv(*arguments)
        finally:
            if next(calls) < 2:
                both.wait()

    monkeypatch.setattr("os.preadv", refused_together)
    assert read_with(reader, [file, file], [4096, 8192]) == [content[:4096], content]
    assert not reader.is_direct


def test_a_file_system_that_does_not_support_direct_reads_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOPNOTSUPP, as some network and FUSE file systems answer instead of EINVAL."""
    file = tmp_path / "file.bin"
    file.write_bytes(b"x" * 4096)
    plain_open = os.open

    def unsupported(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return plain_open(path, flags, *more, **options)

    monkeypatch.setattr("os.open", unsupported)
    assert read_with(Reader([file], threads=1), [file], [4096]) == [b"x" * 4096]


def test_a_file_that_cannot_be_opened_leaves_no_other_open(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReadError, match=r"none\.bin cannot be opened: No such file"):
        Reader([tmp_path / "file.bin", tmp_path / "none.bin"], threads=1)
    assert len(os.listdir("/proc/self/fd")) == before


def read_with(reader: Reader, files: Sequence[Path], sizes: Sequence[int]) -> list[bytes]:
    """Each file's first bytes, read into memory at odd addresses. Closes the reader."""
    memory = [bytearray(size + 1) for size in sizes]
    errors: list[Exception | None] = []
    for file, size, buffer in zip(files, sizes, memory, strict=True):
        reader.submit([(file, 0, size, memoryview(buffer)[1:])], errors.append)
    wait_until(lambda: len(errors) == len(files))
    reader.close()
    assert errors == [None] * len(files)
    return [bytes(buffer[1:]) for buffer in memory]


def test_slots_out_of_service_give_their_memory_back() -> None:
    arena = Arena(60, 1 << 20)
    empty = resident_bytes()
    for slot in range(60):
        arena.bytes_of(slot, 0, 1 << 20).fill_(1)
    assert resident_bytes() - empty > 55 << 20
    arena.give_back_behind(10)
    assert resident_bytes() - empty < 15 << 20
    assert all(arena.bytes_of(slot, 0, 1 << 20).bool().all() for slot in range(10))
