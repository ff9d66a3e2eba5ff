"""The disk yardstick, at small sizes: it reads what it says, cleans up, and refuses what it cannot measure."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from poise.bench.direct_read import PatternRate, ReadPattern, huge_page_buffer, measure_patterns
from poise.bench.disk import best_of, scratch_file
from poise.errors import UsageError
from poise.profile.mounts import in_memory
from poise.units import MIB

SEQUENTIAL = ReadPattern(order="sequential", block_bytes=MIB, threads=1)
RANDOM = ReadPattern(order="random", block_bytes=256 * 1024, threads=2)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    if in_memory(tmp_path):
        pytest.skip("temporary files are in memory here")
    return tmp_path


def test_every_pattern_gets_a_rate_per_round(on_disk: Path) -> None:
    shares: list[float] = []
    with scratch_file(on_disk, 8 * MIB) as path:
        assert path.stat().st_size == 8 * MIB
        rates = measure_patterns(path, [SEQUENTIAL, RANDOM], rounds=2, round_s=0.05, seed=1, on_progress=shares.append)
    assert [rate.pattern for rate in rates] == [SEQUENTIAL, RANDOM]
    assert all(len(rate.rounds_bytes_per_s) == 2 for rate in rates)
    assert all(1e6 < figure < 1e12 for rate in rates for figure in rate.rounds_bytes_per_s)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert list(on_disk.iterdir()) == [], "the scratch file is gone"


def test_the_scratch_file_does_not_compress(on_disk: Path) -> None:
    with scratch_file(on_disk, 16 * MIB) as path:
        data = path.read_bytes()
    assert data[: 8 * MIB] != data[8 * MIB :], "no repetition"
    assert min(data.count(byte) for byte in range(0, 256, 51)) > 0.9 * len(data) / 256


def test_the_scratch_file_goes_when_the_measurement_fails(on_disk: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_file(on_disk, MIB):
        raise KeyboardInterrupt
    assert list(on_disk.iterdir()) == []


def test_the_best_pattern_is_the_one_with_the_highest_median() -> None:
    steady = PatternRate(pattern=SEQUENTIAL, rounds_bytes_per_s=(2.0, 2.0, 2.0))
    lucky = PatternRate(pattern=RANDOM, rounds_bytes_per_s=(1.0, 1.0, 9.0))
    assert best_of([lucky, steady]) is steady


def test_buffers_are_aligned_to_huge_pages_and_of_the_size_asked_for() -> None:
    with huge_page_buffer(3 * MIB) as buffer:
        assert len(buffer) == 3 * MIB
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % (2 * MIB) == 0
        buffer[-1] = 7


def test_too_little_room_is_a_usage_error(on_disk: Path) -> None:
    with pytest.raises(UsageError, match=r"free, and .* are needed"), scratch_file(on_disk, 1 << 60):
        pass


def test_a_directory_in_memory_is_refused() -> None:
    directory = Path("/dev/shm")
    if not directory.is_dir() or not in_memory(directory) or not os.access(directory, os.W_OK):
        pytest.skip("no file system in memory to try")
    with pytest.raises(UsageError, match="in memory"), scratch_file(directory, MIB):
        pass
