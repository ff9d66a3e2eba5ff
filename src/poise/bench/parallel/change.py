"""Ranks or text change in the middle of a run: how soon a policy moves experts, how many, and what that brings.

Four like ranks run passes over new prompts. After ``BEFORE`` of them one rank's share of the processor is cut to half, or the
prompts turn from code to prose. ViBE and EPLB take turns, as the engine runs them, but with shorter windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.bench.parallel.case import Case, cycled, prefill_job, write_rows
from poise.bench.parallel.session import JobResult, Session

BEFORE, AFTER = 40, 80
"""Passes before the change, and after."""
INTERVALS: Mapping[str, int] = {"vibe": 4, "eplb": 32}
"""Passes in a window: half of what the engine has, as runs are short."""
CUT_RANK = 2
CUT_FRAC = 0.5
SMOOTH = 5
"""Passes in the running median by which recovery is judged."""
SETTLED = 16
"""The last passes, whose median is the level that a run comes to."""
NEAR_FRAC = 0.1


def cut_share(session: Session, case: Case, directory: Path, *, rows_per_rank: int) -> dict[str, Any]:
    """One rank becomes half as fast; text stays code."""
    count = rows_per_rank * len(session.layout.ranks)
    prompts = write_rows(directory / "cut.json", cycled(case.rows["code"], (BEFORE + AFTER) * count))
    cores = session.layout.ranks[CUT_RANK].cores
    assert cores is not None, "ranks have shares"
    found = {}
    for balance in INTERVALS:
        cut_ns: list[int] = []

        def cut(passes: int, set_cores: Callable[[int, float], None], at_ns: list[int] = cut_ns) -> None:
            if passes >= BEFORE and not at_ns:
                set_cores(CUT_RANK, cores * CUT_FRAC)
                at_ns.append(time.perf_counter_ns())

        result = session.run(_job(case, prompts, rows_per_rank, balance, tells_passes=True), on_wait=cut)
        stamps_ns = result.facts["stamps_ns"]
        at = int(np.searchsorted(stamps_ns, cut_ns[0]))  # the first pass that began behind it
        found[balance] = _facts(result, at)
    return {
        "change": f"rank {CUT_RANK} from {cores:g} to {cores * CUT_FRAC:g} cores",
        **_about(case, session),
        "policies": found,
    }


def switch_domain(session: Session, case: Case, directory: Path, *, rows_per_rank: int) -> dict[str, Any]:
    """Code becomes prose; ranks stay as they are."""
    count = rows_per_rank * len(session.layout.ranks)
    rows = [cycled(case.rows["code"], BEFORE * count), cycled(case.rows["prose"], AFTER * count)]
    prompts = write_rows(directory / "switch.json", np.concatenate(rows))
    found = {balance: _facts(session.run(_job(case, prompts, rows_per_rank, balance)), BEFORE) for balance in INTERVALS}
    return {"change": "text from code to prose", **_about(case, session), "policies": found}


def recovered_at(step_P: Sequence[float] | npt.NDArray[np.float64], change: int) -> int | None:
    """Passes after pass ``change`` until the running median first comes within a tenth of where the run ends; 0 where the
    change made nothing slower, None where the run ends about as slow as the change made it."""
    steps = np.asarray(step_P, dtype=float)
    level = float(np.median(steps[-SETTLED:]))
    before = float(np.median(steps[max(0, change - SETTLED) : change]))
    worst = float(np.median(steps[change : change + SMOOTH]))
    if worst > before * (1 + NEAR_FRAC) and level * (1 + NEAR_FRAC) > worst:
        return None
    for begin in range(change, len(steps) - SMOOTH + 1):
        if float(np.median(steps[begin : begin + SMOOTH])) <= level * (1 + NEAR_FRAC):
            return begin - change
    return None


def _job(case: Case, prompts: str, rows_per_rank: int, balance: str, **more: Any) -> dict[str, Any]:
    policy = {"interval": INTERVALS[balance]}
    return prefill_job(case, prompts, rows_per_rank=rows_per_rank, balance=balance, policy=policy, **more)


def _about(case: Case, session: Session) -> dict[str, Any]:
    return {
        "model": case.name,
        "shares": [limits.cores for limits in session.layout.ranks],
        "passes_before": BEFORE,
        "passes_after": AFTER,
    }


def _facts(result: JobResult, change: int) -> dict[str, Any]:
    """``detected_after``: passes from the change to the first move behind it; ``worst_s``: right after the change."""
    step_P = result.step_s_P
    history = result.facts["history"]
    behind = [each["at_pass"] for each in history if each["at_pass"] >= change]
    detected = behind[0] - change if behind else None
    recovered = recovered_at(step_P, change)
    return {
        "change_at_pass": change,
        "before_s": float(np.median(step_P[max(0, change - SETTLED) : change])),
        "worst_s": float(np.median(step_P[change : change + SMOOTH])),
        "end_s": float(np.median(step_P[-SETTLED:])),
        "total_after_s": float(step_P[change:].sum()),
        "detected_after_passes": detected,
        "detected_after_s": None if detected is None else float(step_P[change : change + detected].sum()),
        "recovered_after_passes": recovered,
        "recovered_after_s": None if recovered is None else float(step_P[change : change + recovered].sum()),
        "moves_before": sum(each["moved_experts"] for each in history if each["at_pass"] < change),
        "moves_after": sum(each["moved_experts"] for each in history if each["at_pass"] >= change),
        "rearrangements": [[each["at_pass"], each["moved_experts"]] for each in history],
        "step_s": step_P.tolist(),
        "table": result.facts["table"],
    }
