"""`poise bench parallel --suite probe`: balancing each step beside EPLB, ViBE and nothing, on real ranks of a cluster in a box.

What is real and what is simulated is as in ``bench.parallel.run``. Here replicas' bytes go over sockets, too, and the kernel
limits links where a part says so. Where ranks have shares of a processor, the threads that move experts, of all contenders, run
beside them, as copy engines do (part ``no-engines``: within); so do those that look ahead, as on a core to spare. Needs root; a
part without its limits fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from poise.bench.cluster.layout import ClusterLayout, eight_ranks, four_unequal_ranks
from poise.bench.parallel import break_even
from poise.bench.parallel.case import (
    Case,
    beginnings,
    bundled_case,
    cycled,
    equal_ranks,
    random_case,
    wide_case,
    widened_case,
    work_directory,
)
from poise.bench.parallel.contest import AHEAD, MOVERS, ORACLE, PROBE, PROBE_VIBE, ROUNDS, STATIC, WARM_UP, Contenders
from poise.bench.parallel.distilled import distilled
from poise.bench.parallel.online import learning_through_a_switch
from poise.bench.parallel.part_names import PROBE as PROBE_PARTS
from poise.bench.parallel.probe_contenders import ALL, SLOTS, UNPREDICTED, VOLATILE, WAYS
from poise.bench.parallel.probe_passes import MIXED, Passes, Stretch, Uneven, about, begun, linked, mixed, with_engines
from poise.bench.parallel.probe_tables import tables
from poise.bench.parallel.session import Session
from poise.bench.parts import Parts
from poise.bench.publish import publish
from poise.bench.scratch import Scratch

NAME = "parallel-probe"
PARTS = PROBE_PARTS
STEPS = 8
"""Passes that are measured of each contender in each round, unless --steps says otherwise."""
EVEN = 0.01
"""An exponent at which all experts are about as popular."""
RANDOM_IMBALANCE, PROFILE_ROWS = 2.0, 16
"""Of the random model with wide tokens: most of a rank over the mean, by so many rows of other tokens."""
DECODE_ROWS, FEW_RANKS_ROWS, DECODE_PROMPT = 128, 256, 8
"""Sequences of each rank, of eight and of four, and tokens they begin with."""
SWITCH_TOKENS = 12
"""Decode behind a switch: tokens of prose that each sequence gets, from which EPLB and ViBE learn, before code is begun."""
MANY_ROWS, MANY_PROMPT, MANY_TOKENS = 512, 2, 8
"""As many as in the paper; they begin with less and get less, so that a run ends in a minute."""
BURST_PROMPT, BURST_TOKENS, BURSTS_BEFORE = 8, 6, 4
"""Volatile batches: tokens that sequences of a burst begin with, and get; and bursts that do not count."""


class _Suite:
    """The parts, each a method. ``widened``: the bundled model with wide experts."""

    def __init__(self, passes: Passes, widened: Case) -> None:
        self._passes, self._widened = passes, widened

    def parts(self) -> Mapping[str, Callable[[], dict[str, Any]]]:
        """In their order."""
        case, passes = self._widened, self._passes
        unequal = with_engines(four_unequal_ranks())
        known = partial(passes.prefill, case, warm_up=break_even.KNOWN)
        links = with_engines(equal_ranks()), linked()
        return {
            "code": lambda: passes.prefill(case, eight_ranks(), case.rows["code"], self._all() | UNPREDICTED),
            "mixed": lambda: passes.prefill(case, eight_ranks(), mixed(case), self._all()),
            "switch": lambda: self._switch(eight_ranks(), self._all() | UNPREDICTED),
            "decode": lambda: self._decode("code"),
            "decode-mixed": lambda: self._decode(MIXED),
            "decode-switch": lambda: self._decode_switch(64),
            "decode-switch-256": lambda: self._decode_switch(256, rounds=1),
            "decode-switch-512": lambda: self._decode_switch(
                MANY_ROWS, prompt=MANY_PROMPT, tokens=MANY_TOKENS, rounds=1
            ),
            "decode-volatile": self._decode_volatile,
            "unequal": lambda: passes.prefill(case, unequal, case.rows["code"], self._all() | PROBE_VIBE),
            "unequal-decode": lambda: self._decode(
                "code", unequal, STATIC | MOVERS | PROBE | PROBE_VIBE | ORACLE, rows=FEW_RANKS_ROWS
            ),
            "unequal-switch": lambda: self._switch(
                unequal, STATIC | {"vibe": MOVERS["vibe"]} | PROBE | PROBE_VIBE | ORACLE
            ),
            "ways": lambda: known(linked(), mixed(case), STATIC | WAYS | passes.distilled(case, "distilled")),
            "online": self._online,
            "ahead": lambda: known(links[0], case.rows["code"], STATIC | AHEAD),
            "slots": lambda: known(linked(), mixed(case), STATIC | SLOTS),
            "no-engines": lambda: known(equal_ranks(), case.rows["code"], STATIC | PROBE),
            "random": lambda: self._random(wide_case(passes.directory)),
            "random-decode": lambda: self._random_decode(wide_case(passes.directory)),
            "overhead": lambda: break_even.overhead(passes, random_case(passes.directory, skew=EVEN)),
            "break-even-tokens": lambda: break_even.by_tokens(passes, case),
            "break-even-imbalance": lambda: break_even.by_imbalance(passes, case, links[0]),
            "break-even-imbalance-1Gbits": lambda: break_even.by_imbalance(passes, case, links[1]),
        }

    def _all(self) -> Contenders:
        return self._passes.all_of(self._widened)

    def _switch(self, layout: ClusterLayout, contenders: Contenders) -> dict[str, Any]:
        """Prose for as long as nothing counts, then code."""
        case, ranks = self._widened, len(layout.ranks)
        rows = [cycled(case.rows["prose"], WARM_UP * ranks), cycled(case.rows["code"], self._passes.steps * ranks)]
        return self._passes.prefill(case, layout, np.concatenate(rows), contenders)

    def _online(self) -> dict[str, Any]:
        """Predictors that were distilled on prose, and then see code: as they are, and learning."""
        case, directory = self._widened, self._passes.directory
        on_prose = distilled(directory, bundled_case(directory), case, kinds=["prose profile"])
        with Session(with_engines(equal_ranks())) as session:
            facts = learning_through_a_switch(session, case, self._passes.scratch, on_prose)
            return about(case, session, "prefill", case.rows["code"].shape[1]) | facts

    def _decode(
        self,
        kind: str,
        layout: ClusterLayout | None = None,
        contenders: Contenders | None = None,
        *,
        rows: int = DECODE_ROWS,
    ) -> dict[str, Any]:
        """Sequences of one kind."""
        case, layout = self._widened, layout or eight_ranks()
        begun_WT = begun(case, kind, rows * len(layout.ranks), DECODE_PROMPT)
        only = Stretch(rows_WT=begun_WT, tokens=WARM_UP + self._passes.steps)
        return self._passes.decode(case, layout, [only], contenders or self._all(), behind=WARM_UP)

    def _decode_switch(
        self, rows: int, *, prompt: int = DECODE_PROMPT, tokens: int = SWITCH_TOKENS, rounds: int = ROUNDS
    ) -> dict[str, Any]:
        """Code is generated, but for the pass of its prompts, and EPLB and ViBE have arranged experts for prose that was."""
        case, layout = self._widened, eight_ranks()
        prose_WT, code_WT = (begun(case, kind, rows * len(layout.ranks), prompt) for kind in ("prose", "code"))
        stretches = [
            Stretch(rows_WT=prose_WT, tokens=tokens),
            Stretch(rows_WT=code_WT, tokens=1 + self._passes.steps),
        ]
        return self._passes.decode(
            case, layout, stretches, self._all(), behind=tokens + 1, learnt=tokens, rounds=rounds
        )

    def _decode_volatile(self) -> dict[str, Any]:
        """Bursts of requests, all of one burst samples of one prompt, of prose and code in turn: half as many as passes count
        elsewhere. Those of prompts do not."""
        case, layout = self._widened, eight_ranks()
        count, draw = DECODE_ROWS * len(layout.ranks), np.random.default_rng(0)
        counted, stretches = -(-self._passes.steps // 2), list[Stretch]()
        for burst in range(BURSTS_BEFORE + counted):
            rows_WT = case.rows[("prose", "code")[burst % 2]]
            prompt_T = rows_WT[draw.integers(len(rows_WT)), :BURST_PROMPT]
            stretches.append(Stretch(rows_WT=np.tile(prompt_T, (count, 1)), tokens=BURST_TOKENS))
        return self._passes.decode(
            case,
            layout,
            stretches,
            VOLATILE,
            behind=BURSTS_BEFORE * BURST_TOKENS,
            steps=counted * BURST_TOKENS,
            lately=BURST_TOKENS,
            decode_alone=True,
            rounds=1,
            more={"temperature": 1.0},
        )

    def _random(self, case: Case) -> dict[str, Any]:
        """Popular experts together on a rank, and wide tokens for narrow experts."""
        return self._passes.prefill(case, linked(), case.rows["measured"], ALL, lies=_gathered(case))

    def _random_decode(self, case: Case) -> dict[str, Any]:
        """Tokens are sampled: greedily, random weights repeat themselves."""
        begun_WT = beginnings(case.rows["measured"], DECODE_ROWS * len(linked().ranks), DECODE_PROMPT)
        only = Stretch(rows_WT=begun_WT, tokens=WARM_UP + self._passes.steps)
        sampled = {"temperature": 1.0}
        return self._passes.decode(case, linked(), [only], ALL, behind=WARM_UP, lies=_gathered(case), more=sampled)


def _gathered(case: Case) -> Uneven:
    return Uneven(rows_WT=case.rows["profile"][:PROFILE_ROWS], imbalance=RANDOM_IMBALANCE)


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """Each part takes 1 to 10 minutes."""
    directory = work_directory()
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with Scratch() as scratch:
        passes = Passes(directory, scratch.path, steps or STEPS)
        done.run(_Suite(passes, widened_case(directory)).parts())
    results = {"parts": done.results()}
    publish(NAME, results, tables, output=output, json_output=json_output)
    done.raise_if_failed()
