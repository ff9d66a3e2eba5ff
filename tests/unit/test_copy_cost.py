"""What a replica takes from the experts of a rank that moves it with the processor."""

from __future__ import annotations

import pytest

from poise.parallel.copy_cost import DOUBT, KEEP, CopyCost

EXPERT_BYTES = 2_000_000


def test_it_is_processor_time_over_bytes_either_way() -> None:
    made = CopyCost(EXPERT_BYTES, has_engine=False)
    assert made.copy_us == 0, "not known"
    assert made.saw(0.0, 0) == 0.0
    assert made.saw(0.003, 6_000_000) == pytest.approx(0.003)
    assert made.copy_us == 1000
    assert made.saw(0.009, 8_000_000) == pytest.approx(0.006), "since the last time"
    expected = (KEEP * 0.003 + 0.006) / (KEEP * 6e6 + 2e6) * EXPERT_BYTES
    assert made.copy_us == pytest.approx(1e6 * expected, abs=1)


def test_a_copy_engine_takes_nothing() -> None:
    made = CopyCost(EXPERT_BYTES, has_engine=True)
    assert made.saw(0.5, 6_000_000) == 0.0
    assert made.copy_us == 0


def test_what_once_was_dear_is_tried_again() -> None:
    """Time taken without moving anything (the thread is woken and finds nothing) is no cost of copies."""
    made = CopyCost(EXPERT_BYTES, has_engine=False)
    made.saw(0.02, EXPERT_BYTES)
    for layer in range(1000):
        made.saw(0.02 + 1e-5 * layer, EXPERT_BYTES)
    assert made.copy_us == pytest.approx(20_000 * DOUBT**1000, rel=1e-3)
