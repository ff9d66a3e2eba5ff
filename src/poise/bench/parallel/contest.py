"""Policies that take turns over the same passes: what steps last, how even ranks are, what balancing each step did.

Each contender runs ``WARM_UP`` passes that do not count, then those that do, in ``ROUNDS`` rounds of alternating order. EPLB
and ViBE start where their planners put experts by what the first run of ``static`` saw in passes that do not count, as after a
longer run: nothing moves in those that do unless ViBE wants it. The oracle is told all the counts which that run kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.parallel.session import JobResult, Session
from poise.bench.parallel.shapes import predicting_frac
from poise.bench.parallel.unequal import costs_of, placements_of
from poise.bench.parts import say
from poise.engine.balances import REDUNDANT_SLOTS
from poise.errors import PoiseError

WARM_UP = 10
ROUNDS = 2
LONGER, GRACE_S = 1.3, 10.0
"""A run may take so many times as long as the others, and end so much later than it should, before it has failed."""
REPLAY = "counts of an earlier run"
EVEN_TOKENS, EVEN_TIMES = "token-balanced", "speed-aware"
EVEN_LATELY = "token-balanced, by what came last"
"""Stand in a contender for what is made while measuring: counts, and placements, the first two of ``unequal.POLICIES``."""
Contenders = dict[str, Mapping[str, Any]]
STATIC: Contenders = {"static": {"balance": "static"}}
MOVERS: Contenders = {
    "eplb": {"balance": "eplb", "placement": EVEN_TOKENS},
    "vibe": {"balance": "vibe", "policy": {"interval": 2}, "placement": EVEN_TIMES},
}
"""EPLB's next window, of 64 passes, ends behind those of a run."""
PROBE: Contenders = {"probe": {"balance": "probe"}}
PROBE_VIBE: Contenders = {"probe + vibe": {"balance": "probe+vibe", "policy": {"interval": 2}, "placement": EVEN_TIMES}}
AHEAD: Contenders = {
    "inline": {"balance": "probe", "steps": {"ahead": "inline"}},
    "on a thread": {"balance": "probe", "steps": {"ahead": "thread"}},
}
ORACLE: Contenders = {"oracle": {"balance": "probe", "steps": {"predictor": "replayed", "replay": REPLAY}}}


def contest(
    session: Session,
    job: Mapping[str, Any],
    contenders: Contenders,
    directory: Path,
    *,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    behind_tokens: int | None = None,
    learnt_tokens: int | None = None,
    lately: int | None = None,
    steps: int | None = None,
    decode_alone: bool = False,
    until_s: float | None = None,
) -> dict[str, Any]:
    """Facts of each contender; ``job`` is what they have in common, with passes enough. The first one is the yardstick.

    ``behind_tokens``: in place of ``warm_up``: as many passes as it takes until so many tokens are generated.
    ``learnt_tokens``: likewise, of the passes that placements are made from; None: all that do not count. ``lately``: so many
    of those, the last, are what ``EVEN_LATELY`` is made from. ``steps``: passes that count, None: all that are left;
    ``decode_alone``: of them those alone that have no prompt in them, and so the fewest tokens. ``until_s``: by the monotonic
    clock; a run that would not end by then does not begin, and facts are of those before it (``passes``). Raises PoiseError if
    there is none.
    """
    runs: dict[str, list[JobResult]] = {}
    spent_s: list[float] = []
    counted = slice(warm_up, None if steps is None else warm_up + steps)
    needs_records = decode_alone or behind_tokens is not None or any(_stands(each) for each in contenders.values())
    replay: Path | None = None
    placed: Mapping[str, Any] = {}
    for name in _turns(contenders, rounds):
        began_s = time.monotonic()
        if until_s is not None:
            session.within_s = until_s + GRACE_S - began_s
            if until_s - began_s < (LONGER * float(np.median(spent_s)) if spent_s else 0.0):
                say(f"  no time is left for {name}")
                break
        given = _given(contenders[name], replay, placed)
        if needs_records and replay is None and given["balance"] == "static":
            given["keeps_records"] = True  # once, as that takes time
        result = session.run({**job, **given})
        runs.setdefault(name, []).append(result)
        if replay is None and result.load_RPLE is not None:
            warm_up = warm_up if behind_tokens is None else result.passes_until(behind_tokens)
            replay = directory / "replay.npy"
            np.save(replay, result.load_RPLE)
            learnt = warm_up if learnt_tokens is None else result.passes_until(learnt_tokens)
            placed = _placed(result, learnt, lately or learnt)
            counted = _counted(result.load_RPLE, warm_up, steps, decode_alone=decode_alone)
        spent_s.append(time.monotonic() - began_s)
        say(f"  {name}: {1e3 * float(np.median(result.step_s_P[counted])):.0f} ms a pass, {spent_s[-1]:.0f} s in all")
    if not runs:
        raise PoiseError(f"{session.layout.name}: no time is left for a single run; give more")
    facts = {name: summary(runs[name], counted) for name in contenders if name in runs}
    for name, row in facts.items():
        if row["balanced"] is not None:
            frac = predicting_frac(Path(job["model"]), contenders[name].get("steps", {}))
            row["balanced"]["predicting_of_experts_flops"] = frac
    yardstick = facts[next(iter(contenders))]
    for row in facts.values():
        row["speedup"] = yardstick["step_s"] / row["step_s"]
        row["of_even"] = yardstick["even_s"] / row["step_s"]
    return facts


def _turns(contenders: Contenders, rounds: int) -> list[str]:
    """Every second round the other way round."""
    names = list(contenders)
    return [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]


def _stands(contender: Mapping[str, Any]) -> bool:
    """Whether something made while measuring belongs in it."""
    return REPLAY in contender.get("steps", {}).values() or "placement" in contender


def _given(contender: Mapping[str, Any], replay: Path | None, placed: Mapping[str, Any]) -> dict[str, Any]:
    """A contender, with what was made while measuring in the place of what stands for it."""
    given = dict(contender)
    if given.get("steps", {}).get("replay") == REPLAY:
        assert replay is not None, "a static contender comes before the oracle"
        given["steps"] = {**given["steps"], "replay": str(replay)}
    if given.get("placement") in (EVEN_TOKENS, EVEN_TIMES, EVEN_LATELY):
        assert placed, "a static contender comes before those that are placed"
        given["placement"] = placed[given["placement"]]
    return given


def _placed(result: JobResult, passes: int, lately: int) -> Mapping[str, Any]:
    """The planners' placements for what was seen in the first ``passes``, or in the last of those, as a file has them."""
    assert result.load_PLE is not None, "a static contender keeps its counts"
    costs = costs_of([result], passes)
    made = placements_of(result.load_PLE[:passes], costs, REDUNDANT_SLOTS)
    late = placements_of(result.load_PLE[passes - lately : passes], costs, REDUNDANT_SLOTS)
    placed = {EVEN_TOKENS: made[EVEN_TOKENS], EVEN_TIMES: made[EVEN_TIMES], EVEN_LATELY: late[EVEN_TOKENS]}
    return {name: each.to_json() for name, each in placed.items()}


def _counted(load_RPLE: Any, warm_up: int, steps: int | None, *, decode_alone: bool) -> Any:
    """Those that count among a run's passes, as an index."""
    counted = slice(warm_up, None if steps is None else warm_up + steps)
    if not decode_alone:
        return counted
    tokens_P = load_RPLE.sum(axis=(0, 2, 3))
    at_P = np.arange(len(tokens_P))
    return at_P[counted][tokens_P[counted] == tokens_P[counted].min()]


def summary(results: Sequence[JobResult], counted: Any) -> dict[str, Any]:
    """Medians over the passes that count; imbalances of tokens and of time, means. ``expert_s``: the slowest rank's experts of
    each layer. ``even_s``: steps, were they as long as their mean over ranks. ``balanced``: what balancing each step did, None
    where nobody does."""
    step_P = np.concatenate([each.step_s_P[counted] for each in results])
    steps = [each.facts["figures"]["steps"] for each in results]

    def values_P(name: str) -> Any:
        return np.concatenate([np.asarray(each[name])[counted] for each in steps])

    slowest_P, imbalance_P = values_P("slowest_s"), values_P("time_imbalance")
    return {
        "step_s": float(np.median(step_P)),
        "step_s_quartiles": [float(value) for value in np.quantile(step_P, [0.25, 0.75])],
        "step_s_by_round": [float(np.median(each.step_s_P[counted])) for each in results],
        "even_s": float(np.median(step_P - slowest_P * (1.0 - 1.0 / imbalance_P))),
        "passes": len(step_P),
        "token_imbalance": float(values_P("imbalance").mean()),
        "time_imbalance": float(imbalance_P.mean()),
        "expert_s": float(np.median(slowest_P)),
        "moves": sum(change["moved_experts"] for each in results for change in each.facts["history"]),
        "balanced": _balanced([each.facts["balanced"] for each in results], counted),
    }


def _balanced(parts: Sequence[Mapping[str, Any] | None], counted: Any) -> dict[str, Any] | None:
    told = [part["steps"] for part in parts if part is not None]
    if not told:
        return None
    sums = {name: np.concatenate([np.asarray(each[name])[counted] for each in told]) for name in told[0]}
    passes = len(sums["pass_s"])
    return {
        "home_imbalance": float(sums["home_imbalance"].mean()),
        "guessed_wrong_frac": float(sums["guessed_wrong"].sum() / max(sums["own_pairs"].sum(), 1.0)),
        **{
            f"{name}_per_pass": float(sums[name].sum() / passes)
            for name in (
                "replicas_planned",
                "replicas_used",
                "replica_bytes",
                "declined",
                "late",
                "rested",
                "exposed_s",
                "exposed_most_s",
                "aux_s",
            )
        },
        **{
            f"{name}_frac": float(sums[f"{name}_s"].sum() / sums["pass_s"].sum())
            for name in ("exposed", "exposed_most")
        },
    }
