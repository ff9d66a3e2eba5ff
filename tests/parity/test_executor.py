"""The executor has no order of its own: any order of steps that keeps to their dependencies gives the same logits."""

from __future__ import annotations

import random
from typing import Any

import pytest

import poise.engine.runner
from poise import LLM, SamplingParams
from poise.plan.schedule import Schedule, schedule_pass
from tests.conftest import DrawPrompts, MakeCheckpoint

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def shuffled(schedule: Schedule, chance: random.Random) -> Schedule:
    """The same steps in another order in which each comes behind those it waits for; dependencies are dropped on the way."""
    left = list(range(len(schedule.steps)))
    done: set[int] = set()
    order = []
    while left:
        ready = [position for position in left if done.issuperset(schedule.steps[position].after)]
        order.append(chance.choice(ready))
        done.add(order[-1])
        left.remove(order[-1])
    return Schedule(steps=tuple(schedule.steps[position] for position in order), policy=schedule.policy)


@pytest.mark.parametrize(
    "options", [{}, {"dense_layers": 0}, {"kv_on_disk": True}, {"dense_layers": 1, "kv_on_disk": True}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_that_keeps_the_dependencies_generates_the_same_tokens(
    options: dict[str, Any],
    seed: int,
    checkpoint: MakeCheckpoint,
    draw_prompts: DrawPrompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint("mixtral", num_hidden_layers=5)
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((9, 4, 7))]
    with LLM(path, memory="1GiB") as llm:
        want = [result.outputs[0].token_ids for result in llm.generate(prompts, PARAMS)]
    chance, are_other = random.Random(seed), []

    def another_order(**numbers: Any) -> Schedule:
        planned = schedule_pass(**numbers)
        order = shuffled(planned, chance)
        are_other.append(order.steps != planned.steps)
        return order

    monkeypatch.setattr(poise.engine.runner, "schedule_pass", another_order)
    with LLM(path, memory="1GiB", expert_slots=2, groups=[(1, 3)], **options) as llm:
        found = [result.outputs[0].token_ids for result in llm.generate(prompts, PARAMS)]
    assert found == want
    assert all(are_other)
