"""What it costs to look: passes with nothing taken down, with figures of every layer, and with ViBE looking on besides.

Two ranks with a core each decode with the bundled model as it is, whose passes are short, so that the cost shows. ViBE may not
move anything: no gain is enough for it. The three take turns; a first round, in which ViBE's planner compiles its loops, does
not count, but is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.bench.parallel.case import DTYPE, MEMORY, Case, write_rows
from poise.bench.parallel.session import Session

ROWS = 16
NEW_TOKENS = 130
WARM_UP = 10
ROUNDS = 8
NEVER = 2.0
"""A gain that cannot be, as a share of the time."""
WAYS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {"balance": "static", "has_figures": False},
    "figures": {"balance": "static"},
    "figures and ViBE": {"balance": "vibe", "policy": {"least_gain_frac": NEVER}, "redundant_slots": 0},
}


def measure(session: Session, case: Case, directory: Path) -> dict[str, Any]:
    """Median time of a decode pass in each way, and by round."""
    rows = case.rows["code"][:ROWS, :32]
    job = {
        "model": str(case.model),
        "memory": MEMORY,
        "dtype": DTYPE,
        "prompts": write_rows(directory / "watching.json", rows),
        "new_tokens": NEW_TOKENS,
        "groups": [[ROWS // 2, 1]],
    }
    step_s: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in WAYS}
    for number in range(1 + ROUNDS):
        for name in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            result = session.run({**job, **WAYS[name]})
            assert not sum(each["moved_experts"] for each in result.facts["history"]), "nothing may move"
            step_s[name].append(result.step_s_P[WARM_UP:])
    ways = {name: _facts(rounds) for name, rounds in step_s.items()}
    for facts in ways.values():
        facts["over_nothing"] = facts["step_s"] / ways["nothing"]["step_s"]
    return {"model": case.name, "sequences": ROWS, "passes": ROUNDS * (NEW_TOKENS - WARM_UP), "ways": ways}


def _facts(rounds: Sequence[npt.NDArray[np.float64]]) -> dict[str, Any]:
    """``step_s``: the median of the rounds' medians: a round that was disturbed does not decide."""
    first_s, *by_round = [float(np.median(each)) for each in rounds]
    return {
        "step_s": float(np.median(by_round)),
        "mean_s": float(np.concatenate(rounds[1:]).mean()),
        "step_s_by_round": by_round,
        "first_round_s": first_s,
    }
