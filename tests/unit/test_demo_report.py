"""What `poise demo` tells a person: figures, and every caveat that belongs to them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from poise.bench.demo_report import Contender, DemoReport, print_report
from poise.units import GIB, MIB


def contender(*, tokens: int, seconds: float, read_bytes: int | None, texts: tuple[str, ...]) -> Contender:
    return Contender(
        start_s=4.0,
        generate_s=seconds,
        generated_tokens=tokens,
        read_bytes=read_bytes,
        peak_bytes=500 * MIB,
        texts=texts,
    )


POISE = contender(tokens=96, seconds=4.0, read_bytes=3 * 10**9, texts=(" one [b]two", " three"))
SLOW = contender(tokens=48, seconds=20.0, read_bytes=17 * 10**9, texts=(" one", " four"))


def report(*, accelerate: Contender | None, remark: str | None = None, missing: tuple[str, ...] = ()) -> DemoReport:
    return DemoReport(
        prompts=("def f():", "The"),
        max_tokens=48,
        factor=64,
        weights_bytes=540 * MIB,
        base_bytes=300 * MIB,
        budget_bytes=180 * MIB,
        disk_bytes_per_s=1.5e9,
        poise=POISE,
        accelerate=accelerate,
        remark=remark,
        plan={
            "expert_slots": 40,
            "experts": 192,
            "expert_bytes": 3 * MIB,
            "direct_io": True,
            "num_batches": 2,
            "batch_size": 2,
            "chunk_tokens": 32,
        },
        limits_enforced=() if missing else ("memory 480 MiB, page cache included",),
        limits_missing=missing,
    )


def printed(what: DemoReport) -> str:
    console = Console(file=io.StringIO(), width=400)
    print_report(what, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures_are_ratios_of_what_was_measured() -> None:
    both = report(accelerate=SLOW)
    assert both.speedup == pytest.approx(24.0 / 2.4)
    assert both.disk_frac == pytest.approx(0.5)
    assert both.same_texts == 1
    assert both.limit_bytes == 480 * MIB


def test_texts_and_figures_are_printed_as_they_are() -> None:
    text = printed(report(accelerate=SLOW))
    assert "def f(): one [b]two" in text, "a text is no markup"
    for figure in ("24", "2.4", "3.00 GB", "17.00 GB", "10 times", "50%", "1 of 2 texts agree", "40 of 192 experts"):
        assert figure in text
    assert "Enforced by the kernel: memory 480 MiB, page cache included." in text


def test_a_missing_baseline_is_explained() -> None:
    alone = report(
        accelerate=None, remark="Accelerate is not installed; for the comparison: pip install 'poise[bench]'"
    )
    text = printed(alone)
    assert alone.speedup is None
    assert "pip install 'poise[bench]'" in text
    assert "times as many tokens" not in text


def test_a_limit_that_is_not_enforced_is_said_to_flatter_the_baseline() -> None:
    text = printed(report(accelerate=SLOW, missing=(f"memory {GIB}: not root",)))
    assert "NOT enforced" in text
    assert "page cache" in text
