"""Ranks that wait for replicas stop where that takes too long, and try again."""

from __future__ import annotations

from pathlib import Path

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.parallel.launch import Launch
from poise.parallel.replica_fetch import Fetched
from poise.parallel.step_options import StepOptions
from tests.conftest import DrawPrompts, MakeCheckpoint
from tests.parallel.test_parallel_llm import PATIENT
from tests.parallel.test_probe import dawdle_in
from tests.ranks import start_ranks

TOKENS = 60


def replicas_used(launch: Launch, path: Path, prompts: list[list[int]]) -> list[int]:
    """By layer and pass. The link once was so busy that an expert would have taken some 0.1 s."""
    used: list[int] = []
    steps = StepOptions(predictor="none", rests=False)
    with ParallelLLM(
        path, launch, memory="2GiB", patience=PATIENT, balance="probe", steps=steps, groups=[(4, 2)]
    ) as llm:
        layers = llm.runner.layers
        assert layers.balance is not None
        expert_bytes = layers.balance._slots.slot_bytes
        for _ in range(40):
            layers.balance._windows.fetched(Fetched(arrived=(False,), nbytes=expert_bytes, busy_s=0.1))
        layers.on_record = lambda record: used.append(record.note.replicas_used)
        dawdle_in(llm.runner.model, 3e-3)
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return used


def test_they_wait_again_when_the_link_may_have_become_faster(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    path, prompts = checkpoint("qwen3_moe"), draw_prompts((5, 7, 9, 4, 3, 12, 8, 6))
    used_RN = start_ranks(replicas_used, 2, tmp_path, path, prompts).results(within_s=120)
    used_N = [sum(each) for each in zip(*used_RN, strict=True)]
    assert not any(used_N[4:20]), "the link is too slow for what a token takes"
    assert any(used_N), "nobody ever tries again"
