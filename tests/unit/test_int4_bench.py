"""``poise bench int4``: its perplexity is transformers' own, and what it prints is what it measured."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from poise import LLM
from poise.bench.int4 import BUNDLED, Loss, Report, Speed, print_report, window_nats
from tests.conftest import DrawPrompts, Reference


def test_the_loss_of_a_window_is_that_of_transformers(reference: Reference, draw_prompts: DrawPrompts) -> None:
    (ids,) = draw_prompts([120])
    with LLM(BUNDLED, memory="1GiB", dtype="float32") as llm:
        found = window_nats(llm.runner, ids)
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        wanted = reference(BUNDLED, torch.float32)(ids_1T, labels=ids_1T).loss * (len(ids) - 1)
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_the_tables_show_losses_bytes_and_rates() -> None:
    report = Report(
        losses=(Loss(domain="code", tokens=32768, nats_none=2.0, nats_int4=2.01),),
        weight_error=0.082,
        budget_bytes=1 << 28,
        making_s=9.9,
        speeds=(
            Speed(
                quantize="none", tokens_per_s=(3.0, 1.0, 2.0), experts_bytes=1 << 30, read_bytes=1 << 31, hit_frac=0.5
            ),
            Speed(
                quantize="int4", tokens_per_s=(9.0, 7.0, 8.0), experts_bytes=1 << 28, read_bytes=1 << 20, hit_frac=0.9
            ),
        ),
    )
    text = io.StringIO()
    print_report(report, Console(file=text, width=120))
    rows = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert "code 32,768 7.389 7.463 +1.01%" in rows
    assert "none 1 GiB 2 GiB 50% 2 1 3" in rows
    assert "int4 256 MiB 1 MiB 90% 8 7 9" in rows
    assert "Relative weight error 0.082" in text.getvalue()
