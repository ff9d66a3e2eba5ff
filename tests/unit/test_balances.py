"""What ``balance`` names, alone and with what is given in its place, and what "auto" becomes where."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.engine.balances import BALANCES, Balances
from poise.engine.vibe import Vibe
from poise.errors import UsageError
from poise.parallel.step_options import StepOptions
from poise.plan.rebalance import Eplb, Rebalance


def of(
    name: str,
    policy: Rebalance | None = None,
    steps: StepOptions | None = None,
    *,
    num_ranks: int = 2,
    device: str = "cpu",
) -> Balances:
    return Balances.of(name, policy, steps, num_ranks=num_ranks, device=device)


@pytest.mark.parametrize("name", BALANCES)
def test_every_name_is_what_it_says(name: str) -> None:
    assert of(name).name == name


def test_auto_balances_each_step_where_replicas_can_come_and_says_why_it_does_not() -> None:
    assert of("auto").name == "probe"
    assert (of("auto", num_ranks=1).name, of("auto", num_ranks=1).reason) == ("static", "one rank has all experts")
    on_gpus = of("auto", device="cuda")
    assert on_gpus.name == "static"
    assert "GPUs" in on_gpus.reason
    assert of("probe", device="cuda").name == "probe", "it was asked for"


def test_what_is_given_is_what_runs() -> None:
    steps = StepOptions(lookahead=Path("p.safetensors"), replica_slots=2)
    asked = of("auto", steps=steps, num_ranks=1)
    assert (asked.name, asked.steps, asked.replica_slots) == ("probe", steps, 2)
    assert of("auto", policy=Eplb()).name == "eplb", "whoever gives a policy has chosen"
    both = of("probe+vibe", policy=Vibe(interval=2), steps=steps)
    assert (both.policy, both.steps, both.redundant_slots) == (Vibe(interval=2), steps, 2)
    assert of("probe", policy=Vibe()).name == "probe+vibe"


def test_a_name_that_is_not_known_is_refused_with_all_that_are() -> None:
    with pytest.raises(
        UsageError, match=r"balance 'vibe\+probe' is not supported; choose one of auto, static, .*probe"
    ):
        of("vibe+probe")
