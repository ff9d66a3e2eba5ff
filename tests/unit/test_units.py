"""Sizes and durations: what people may write, and what they get to read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import UsageError
from poise.units import GIB, KIB, MIB, format_bytes, format_s, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("2G", 2 * GIB),
        ("2m", 2 * MIB),
        ("512MB", 512_000_000),
        ("1TB", 10**12),
        ("4KiB", 4 * KIB),
        ("123", 123),
        ("123B", 123),
        (77, 77),
    ],
)
def test_sizes_that_people_write(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "eight GiB", "8 GiB please", "8XB", "-8GiB", "8,5GiB", "1e9", "auto", "٣GiB x"]
)
def test_what_is_no_size_is_refused_with_the_value_and_an_example(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_bytes(text)
    assert repr(text) in str(refusal.value)
    assert "8GiB" in str(refusal.value)


@pytest.mark.parametrize("size", [1.5e9, None, True, False, b"8GiB", ["8GiB"]])
def test_what_is_neither_text_nor_a_whole_number_is_refused_with_the_value(size: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_bytes(size)
    assert str(refusal.value).startswith(
        f"memory size {size!r} is neither a text nor a whole number of bytes; write 8GiB"
    )


@pytest.mark.parametrize("size", ["9" * 400 + "GiB", "9" * 5000, "2000PB", "1048577TiB", 1 << 61, 10**400])
def test_a_size_beyond_all_memory_is_refused_in_a_short_line(size: str | int) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_bytes(size)
    assert "8GiB" in str(refusal.value)
    assert len(str(refusal.value)) < 160


@pytest.mark.parametrize("size", ["0", "0GiB", 0, -1, "0.2"])
def test_a_size_must_be_positive(size: str | int) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (999 * MIB, "999 MiB"),
        (1000 * MIB, "1000 MiB"),
        (1023 * MIB, "1023 MiB"),
        (GIB, "1 GiB"),
        (12.34 * GIB, "12.3 GiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_sizes_that_people_read(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=1, max_value=1 << 50))
def test_a_printed_size_can_be_typed_again_and_is_near(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (12.3e-6, "12.3 us"),
        (0.0123, "12.3 ms"),
        (1, "1 s"),
        (59.9, "59.9 s"),
        (75, "1m15s"),
        (3600, "1h00m"),
        (7384, "2h03m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(999.6e-6, "1 ms"), (0.9996, "1 s"), (59.96, "1m00s")])
def test_a_duration_that_rounds_up_to_the_next_unit_is_shown_in_it(seconds: float, text: str) -> None:
    assert format_s(seconds) == text
