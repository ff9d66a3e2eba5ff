"""Policies that take turns over the same passes: what steps last, how even ranks are, what balancing each step did.

Each contender runs ``WARM_UP`` passes that do not count, in which EPLB and ViBE rearrange experts, then those that do, in
``ROUNDS`` rounds of alternating order. The oracle is told the counts that the first run of ``static`` kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.parallel.session import JobResult, Session

WARM_UP = 10
ROUNDS = 2
REPLAY = "counts of an earlier run"
"""Stands in a contender for the file that is made while measuring."""
Contenders = dict[str, Mapping[str, Any]]
STATIC: Contenders = {"static": {"balance": "static"}}
MOVERS: Contenders = {
    "eplb": {"balance": "eplb", "policy": {"interval": 4}},
    "vibe": {"balance": "vibe", "policy": {"interval": 2}},
}
PROBE: Contenders = {"probe": {"balance": "probe"}}
PROBE_VIBE: Contenders = {"probe + vibe": {"balance": "probe+vibe", "policy": {"interval": 2}}}
ORACLE: Contenders = {"oracle": {"balance": "probe", "steps": {"predictor": "replayed", "replay": REPLAY}}}


def contest(
    session: Session,
    job: Mapping[str, Any],
    contenders: Contenders,
    directory: Path,
    *,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Facts of each contender; ``job`` is what they have in common, with passes enough. The first one is the yardstick."""
    runs: dict[str, list[JobResult]] = {name: [] for name in contenders}
    replay: Path | None = None
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            given = dict(contenders[name])
            if given["balance"] == "static":
                given["keeps_records"] = True
            if given.get("steps", {}).get("replay") == REPLAY:
                assert replay is not None, "a static contender comes before the oracle"
                given["steps"] = {**given["steps"], "replay": str(replay)}
            result = session.run({**job, **given})
            runs[name].append(result)
            if replay is None and result.load_RPLE is not None:
                replay = directory / "replay.npy"
                np.save(replay, result.load_RPLE)
    facts = {name: summary(results, warm_up) for name, results in runs.items()}
    yardstick_s = facts[next(iter(contenders))]["step_s"]
    for row in facts.values():
        row["speedup"] = yardstick_s / row["step_s"]
    return facts


def summary(results: Sequence[JobResult], warm_up: int) -> dict[str, Any]:
    """Medians over the passes that count; imbalances of tokens and of time, means. ``expert_s``: the slowest rank's experts of
    each layer. ``balanced``: what balancing each step did, None where nobody does."""
    step_P = np.concatenate([each.step_s_P[warm_up:] for each in results])
    steps = [each.facts["figures"]["steps"] for each in results]

    def values_P(name: str) -> Any:
        return np.concatenate([each[name][warm_up:] for each in steps])

    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "step_s_by_round": [float(np.median(each.step_s_P[warm_up:])) for each in results],
        "passes": len(step_P),
        "token_imbalance": float(values_P("imbalance").mean()),
        "time_imbalance": float(values_P("time_imbalance").mean()),
        "expert_s": float(np.median(values_P("slowest_s"))),
        "moves": sum(change["moved_experts"] for each in results for change in each.facts["history"]),
        "balanced": _balanced([each.facts["balanced"] for each in results], warm_up),
    }


def _balanced(parts: Sequence[Mapping[str, Any] | None], warm_up: int) -> dict[str, Any] | None:
    told = [part["steps"] for part in parts if part is not None]
    if not told:
        return None
    sums = {name: np.concatenate([each[name][warm_up:] for each in told]) for name in told[0]}
    passes = len(sums["pass_s"])
    return {
        "home_imbalance": float(sums["home_imbalance"].mean()),
        "guessed_wrong_frac": float(sums["guessed_wrong"].sum() / max(sums["own_pairs"].sum(), 1.0)),
        **{
            f"{name}_per_pass": float(sums[name].sum() / passes)
            for name in ("replicas_planned", "replicas_used", "replica_bytes", "declined", "exposed_s", "aux_s")
        },
        "exposed_frac": float(sums["exposed_s"].sum() / sums["pass_s"].sum()),
    }
