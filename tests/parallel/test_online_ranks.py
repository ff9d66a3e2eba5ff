"""Ranks whose predictors learn while they run: each for itself, at bounded cost, with the tokens of plain transformers."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.parallel.launch import Launch
from poise.parallel.step_options import StepOptions
from tests.conftest import DrawPrompts, MakeCheckpoint, Reference
from tests.parallel.test_parallel_llm import PATIENT, expected
from tests.parallel.test_probe import dawdle_in, records_of
from tests.ranks import start_ranks

TOKENS, CALLS = 3, 20


def generate_again_and_again(launch: Launch, path: Path, prompts: list[list[int]], ahead: str) -> dict[str, Any]:
    """The same traffic in each call; tokens of each on rank 0, and what every rank took down of the predicted layer."""
    steps = StepOptions(online=True, rests=False, ahead=ahead)
    with ParallelLLM(
        path, launch, memory="2GiB", patience=PATIENT, balance="probe", steps=steps, groups=[(4, 2)]
    ) as llm:
        records = records_of(llm.runner.layers)
        dawdle_in(llm.runner.model, 2e-4)
        tokens, lines, began_s = [], [], perf_counter()
        if launch.rank > 0:
            llm.follow()
        else:
            for _ in range(CALLS):
                made = llm.generate(
                    [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(max_tokens=TOKENS, ignore_eos=True)
                )
                tokens.append([list(each.outputs[0].token_ids) for each in made])
                assert llm.step_figures is not None
                lines.append(llm.step_figures.lines(str(llm.predictor))[1])
        return {"tokens": tokens, "records": records, "lines": lines, "elapsed_s": perf_counter() - began_s}


@pytest.mark.parametrize(("ahead", "where"), [("inline", ""), ("thread", ", on a thread of its own")])
def test_predictors_of_two_ranks_learn_and_text_stays_the_same(
    ahead: str,
    where: str,
    checkpoint: MakeCheckpoint,
    reference: Reference,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((40, 31, 36, 25, 33, 28, 22, 38))
    results = start_ranks(generate_again_and_again, 2, tmp_path, path, prompts, ahead).results(within_s=120)
    assert results[0]["tokens"] == [[expected(reference(path), prompt, TOKENS) for prompt in prompts]] * CALLS
    for result in results:
        notes = [record.note for record in result["records"]]
        spent_s = sum(note.learnt_s for note in notes)
        longest_s = max(note.learnt_s for note in notes)
        assert sum(note.learnt_steps for note in notes) > 10
        assert spent_s <= 0.05 * result["elapsed_s"] + longest_s
        wrong = [record.note.guessed_wrong for record in result["records"] if record.layer == 1]
        own = [record.note.own_pairs for record in result["records"] if record.layer == 1]
        begin, end = (np.sum(wrong[part]) / np.sum(own[part]) for part in (slice(0, 15), slice(-15, None)))
        assert end < 0.8 * begin, f"{begin:.0%} of the tokens were guessed wrong at first, {end:.0%} at last"
    line = results[0]["lines"][-1]
    who = f"routers and residuals, asked a layer early (1 of 2 layers), learning online{where}"
    assert line.startswith(f"predicted by {who}: ")
    assert "steps of learning meanwhile" in line
