"""`poise bench parallel --suite probe`: balancing each step beside EPLB, ViBE and nothing, on real ranks of a cluster in a box.

What is real and what is simulated is as in ``bench.parallel.run``. Here replicas' bytes go over sockets, too, and the kernel
limits links where a part says so. Where ranks have shares of a processor, the threads that move experts, of all contenders, run
beside them, as copy engines do (part ``no-engines``: within); so do those that look ahead, as on a core to spare. Needs root; a
part without its limits fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import (
    GBIT_PER_S,
    ClusterLayout,
    eight_ranks,
    four_unequal_ranks,
    slow_link,
    two_ranks,
)
from poise.bench.parallel.case import (
    Case,
    beginnings,
    bundled_case,
    cycled,
    equal_ranks,
    prefill_job,
    random_case,
    widened_case,
    work_directory,
    write_rows,
)
from poise.bench.parallel.contest import (
    AHEAD,
    MOVERS,
    ORACLE,
    PROBE,
    PROBE_VIBE,
    ROUNDS,
    STATIC,
    WARM_UP,
    Contenders,
    contest,
)
from poise.bench.parallel.distilled import distilled
from poise.bench.parallel.online import learning_through_a_switch
from poise.bench.parallel.probe_tables import tables
from poise.bench.parallel.session import Session
from poise.bench.parts import Parts
from poise.bench.publish import publish
from poise.bench.scratch import Scratch

NAME = "parallel-probe"
STEPS = 8
"""Passes that are measured of each contender in each round, unless --steps says otherwise."""
KNOWN = 6
"""Passes after which costs are known."""
DECODE_ROWS, DECODE_PROMPT = 128, 8
"""Sequences of each rank, and tokens they begin with."""
SWITCH_TOKENS = 12
"""Decode behind a switch: tokens of prose that each sequence gets, from which EPLB and ViBE learn, before code is begun."""
MANY_ROWS, MANY_PROMPT, MANY_TOKENS = 512, 2, 8
"""As many as in the paper; they begin with less and get less, so that a run ends in a minute."""
MIXED = "code and prose"
EVEN = 0.01
"""An exponent at which all experts are about as popular."""
SKEWS = (EVEN, 0.35, 0.7)
TOKENS = (16, 64, 256)
OVERHEAD_ROWS, OVERHEAD_TOKENS = (4, 16), 64
"""Prompts of each rank in a pass, and tokens of each: few enough to come in whole."""
LINKS: Mapping[str, Callable[[], ClusterLayout]] = {
    "loopback": two_ranks,
    "4 Gbit/s": lambda: two_ranks().with_link(4 * GBIT_PER_S),
    "1 Gbit/s": slow_link,
}
UNPREDICTED: Contenders = {
    "after the gate": {"balance": "probe", "steps": {"predictor": "none"}},
    "last pass": {"balance": "probe", "steps": {"predictor": "last"}},
}
WAYS: Contenders = {
    **UNPREDICTED,
    "frozen gate": {"balance": "probe"},
    "not suspended": {"balance": "probe", "steps": {"suspends": False}},
    **ORACLE,
}
SLOTS: Contenders = {
    f"{slots} replica slots": {"balance": "probe", "steps": {"replica_slots": slots}} for slots in range(5)
}
ALL: Contenders = STATIC | MOVERS | PROBE | ORACLE


class _Suite:
    """The parts, each a method. ``scratch``: for prompts; ``steps``: passes that count."""

    def __init__(self, directory: Path, scratch: Path, steps: int) -> None:
        self._scratch, self._steps = scratch, steps
        self._directory = directory

    def parts_of(self, widened: Case) -> Mapping[str, Callable[[], dict[str, Any]]]:
        """In their order."""
        links = {name.replace(" ", "").replace("/", ""): layout for name, layout in LINKS.items()}
        unequal = replace(four_unequal_ranks(), copy_engines=True)
        return {
            "code": lambda: self._prefill(widened, eight_ranks(), _rows(widened, "code"), self._every(widened)),
            "mixed": lambda: self._prefill(widened, eight_ranks(), _mixed(widened), self._all(widened)),
            "switch": lambda: self._switch(widened),
            "decode": lambda: self._decode(widened, ["code"], self._all(widened), WARM_UP),
            "decode-mixed": lambda: self._decode(widened, [MIXED], self._all(widened), WARM_UP),
            "decode-switch": lambda: self._decode_switch(widened, 64),
            "decode-switch-256": lambda: self._decode_switch(widened, 256),
            "decode-switch-512": lambda: self._decode_switch_of_many(widened),
            "unequal": lambda: self._prefill(widened, unequal, _rows(widened, "code"), self._all(widened) | PROBE_VIBE),
            "ways": lambda: self._ways(widened),
            "online": lambda: self._online(widened),
            "ahead": lambda: self._prefill(widened, _aside(), _rows(widened, "code"), STATIC | AHEAD, warm_up=KNOWN),
            "slots": lambda: self._prefill(widened, _linked(), _mixed(widened), STATIC | SLOTS, warm_up=KNOWN),
            "no-engines": lambda: self._prefill(
                widened, equal_ranks(), _rows(widened, "code"), STATIC | PROBE, warm_up=KNOWN
            ),
            "random": lambda: self._prefill(self._random(0.7), LINKS["4 Gbit/s"](), None, ALL),
            "overhead": self._overhead,
            "break-even-tokens": lambda: self._break_even_tokens(widened),
            **{f"break-even-{name}": self._break_even(layout) for name, layout in links.items()},
        }

    def _random(self, skew: float) -> Case:
        return random_case(self._directory, skew=skew)

    def _prefill(
        self,
        case: Case,
        layout: ClusterLayout,
        rows_WT: Any,
        contenders: Contenders,
        *,
        rows_per_rank: int = 1,
        warm_up: int = WARM_UP,
        rounds: int = 2,
    ) -> dict[str, Any]:
        """Passes over new prompts. ``rows_WT``: None for the case's own."""
        rows_WT = next(iter(case.rows.values())) if rows_WT is None else rows_WT
        count = rows_per_rank * len(layout.ranks) * (self._steps + warm_up)
        prompts = write_rows(self._scratch / "prefill.json", cycled(rows_WT, count))
        job = prefill_job(case, prompts, rows_per_rank=rows_per_rank)
        with Session(layout) as session:
            facts = contest(session, job, contenders, self._scratch, rounds=rounds, warm_up=warm_up)
            return self._about(case, session, "prefill", rows_per_rank * rows_WT.shape[1]) | {"policies": facts}

    def _ways(self, case: Case) -> dict[str, Any]:
        """All ways to know the counts of the layer to come, and without suspension."""
        ways = STATIC | WAYS | self._distilled(case, "distilled")
        return self._prefill(case, _linked(), _mixed(case), ways, warm_up=KNOWN)

    def _every(self, case: Case) -> Contenders:
        return self._all(case) | UNPREDICTED

    def _all(self, case: Case) -> Contenders:
        return STATIC | MOVERS | PROBE | self._distilled(case, "probe, distilled") | ORACLE

    def _distilled(self, case: Case, name: str) -> Contenders:
        trained = distilled(self._directory, bundled_case(self._directory), case)
        return {name: {"balance": "probe", "steps": {"lookahead": str(trained)}}}

    def _switch(self, case: Case) -> dict[str, Any]:
        """Prose for as long as nothing counts, then code."""
        layout = eight_ranks()
        ranks = len(layout.ranks)
        rows = [cycled(case.rows["prose"], WARM_UP * ranks), cycled(case.rows["code"], self._steps * ranks)]
        return self._prefill(case, layout, np.concatenate(rows), self._every(case))

    def _online(self, case: Case) -> dict[str, Any]:
        """Predictors that were distilled on prose, and then see code: as they are, and learning."""
        on_prose = distilled(self._directory, bundled_case(self._directory), case, kinds=["prose profile"])
        with Session(_aside()) as session:
            facts = learning_through_a_switch(session, case, self._scratch, on_prose)
            return self._about(case, session, "prefill", case.rows["code"].shape[1]) | facts

    def _decode_switch(self, case: Case, rows: int) -> dict[str, Any]:
        """Code is generated, and EPLB and ViBE have arranged experts for prose that was."""
        rounds = ROUNDS if rows < DECODE_ROWS else 1
        return self._decode(case, ["prose", "code"], self._all(case), SWITCH_TOKENS, rows=rows, rounds=rounds)

    def _decode_switch_of_many(self, case: Case) -> dict[str, Any]:
        """As many sequences a rank as the paper's least."""
        contenders = self._all(case)
        return self._decode(
            case, ["prose", "code"], contenders, MANY_TOKENS, rows=MANY_ROWS, prompt=MANY_PROMPT, rounds=1
        )

    def _decode(
        self,
        case: Case,
        kinds: Sequence[str],
        contenders: Contenders,
        passes: int,
        *,
        rows: int = DECODE_ROWS,
        prompt: int = DECODE_PROMPT,
        rounds: int = ROUNDS,
    ) -> dict[str, Any]:
        """Sequences of one kind, ``passes`` tokens of each, then of the next; those of the last kind count, without prefill, or
        behind as many tokens if there is no other."""
        layout = eight_ranks()
        per_kind = rows * len(layout.ranks)
        rows_WT = np.concatenate([_beginnings(case, kind, per_kind, prompt) for kind in kinds])
        prompts = write_rows(self._scratch / "decode.json", rows_WT)
        *others, last = [passes] * (len(kinds) - 1) + [1 if len(kinds) > 1 else passes]
        new_tokens = np.repeat([*others, last + self._steps], per_kind).tolist()
        before = (sum(others) + last) * per_kind
        job = {**prefill_job(case, prompts, rows_per_rank=rows), "new_tokens": new_tokens}
        with Session(layout) as session:
            facts = contest(
                session,
                job,
                contenders,
                self._scratch,
                rounds=rounds,
                behind_tokens=before,
                learnt_tokens=sum(others) * per_kind if others else None,
                steps=self._steps,
            )
            return self._about(case, session, "decode", rows) | {"policies": facts}

    def _overhead(self) -> dict[str, Any]:
        """Even popularity: nothing to gain, so what balancing costs is seen, in short passes and in long ones."""
        case, layout = self._random(EVEN), two_ranks()
        rows_WT = next(iter(case.rows.values())).reshape(-1, OVERHEAD_TOKENS)
        rows = [
            self._prefill(case, layout, rows_WT, STATIC | PROBE, rows_per_rank=count, rounds=4, warm_up=KNOWN)
            for count in OVERHEAD_ROWS
        ]
        return {"rows": rows}

    def _break_even_tokens(self, case: Case) -> dict[str, Any]:
        """From few tokens, for which experts are hardly more than the reading of their weights, to many."""
        rows = []
        for tokens in TOKENS:
            few = case.rows["code"][:, :tokens]
            part = self._prefill(case, _aside(), few, STATIC | PROBE, warm_up=KNOWN)
            rows.append({"tokens": tokens, **part})
        return {"rows": rows}

    def _break_even(self, layout: Callable[[], ClusterLayout]) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            rows = []
            for skew in SKEWS:
                case = self._random(skew)
                part = self._prefill(case, layout(), None, STATIC | PROBE, warm_up=KNOWN)
                rows.append({"skew": skew, **part})
            return {"rows": rows}

        return measure

    def _about(self, case: Case, session: Session, kind: str, tokens: int) -> dict[str, Any]:
        return {
            "model": case.name,
            "pass": kind,
            "tokens_per_rank": tokens,
            "layout": session.layout.name,
            "shares": [limits.cores for limits in session.layout.ranks],
            "limits_enforced": list(session.enforced),
            "limits_missing": list(session.missing),
        }


PARTS = (
    "code",
    "mixed",
    "switch",
    "decode",
    "decode-mixed",
    "decode-switch",
    "decode-switch-256",
    "decode-switch-512",
    "unequal",
    "ways",
    "online",
    "ahead",
    "slots",
    "no-engines",
    "random",
    "overhead",
    "break-even-tokens",
    "break-even-loopback",
    "break-even-4Gbits",
    "break-even-1Gbits",
)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """Each part takes 1 to 10 minutes."""
    directory = work_directory()
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with Scratch() as scratch:
        done.run(_Suite(directory, scratch.path, steps or STEPS).parts_of(widened_case(directory)))
    results = {"parts": done.results()}
    publish(NAME, results, tables, output=output, json_output=json_output)
    done.raise_if_failed()


def _linked() -> ClusterLayout:
    """Four like ranks behind links of 1 Gbit/s, which replicas and tokens must share."""
    return _aside().with_link(GBIT_PER_S)


def _aside() -> ClusterLayout:
    """Four like ranks with copy engines."""
    return replace(equal_ranks(), copy_engines=True)


def _rows(case: Case, kind: str) -> Any:
    return case.rows[kind]


def _beginnings(case: Case, kind: str, count: int, tokens: int) -> Any:
    """``count`` stretches of so many tokens, from all over the rows; ``MIXED``: half of them code, half prose, on each rank."""
    if kind == MIXED:
        return np.concatenate([_beginnings(case, each, count // 2, tokens) for each in ("code", "prose")])
    return beginnings(case.rows[kind], count, tokens)


def _mixed(case: Case) -> Any:
    """Code and prose in turn, so that no two passes are alike."""
    code, prose = case.rows["code"], case.rows["prose"]
    count = min(len(code), len(prose))
    return np.stack([code[:count], prose[:count]], axis=1).reshape(-1, code.shape[1])
