"""`poise bench parallel`: an expert-parallel job on real ranks of a cluster in a box, ViBE beside EPLB and no balancing.

Real: processes, Gloo, weights, routing, migration, the policies as the engine runs them. Simulated: devices are shares of one
processor (quotas that the kernel enforces), links are rates that it enforces, all on one machine. Shares sum to less than its
cores, so that ranks wait for their quota and not for each other. Needs root; a part without its limits fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from poise.bench.cluster.layout import four_unequal_ranks, two_ranks
from poise.bench.parallel import change, exactness, halves, scaling, unequal, watching
from poise.bench.parallel.case import Case, bundled_case, equal_ranks, random_case, widened_case, work_directory
from poise.bench.parallel.part_names import PARALLEL
from poise.bench.parallel.session import Session
from poise.bench.parallel.tables import tables
from poise.bench.parts import Parts, say
from poise.bench.publish import publish
from poise.bench.scratch import Scratch

NAME = "parallel"
PARTS = PARALLEL
STEPS = 12
"""Passes that are measured of each contender in each round, unless --steps says otherwise."""


def run(output: Path | None, json_output: bool, *, parts: Sequence[str] = (), steps: int | None = None) -> None:
    """Each part takes 1 to 4 minutes."""
    directory = work_directory()
    say("Making the models, or finding them")
    widened, random = widened_case(directory), random_case(directory)
    done = Parts(directory, NAME, order=PARTS, wanted=parts)
    with Scratch() as scratch:
        done.run(_measures(widened, random, bundled_case(directory), scratch.path, steps or STEPS))
    results = {"parts": done.results()}
    publish(NAME, results, tables, output=output, json_output=json_output)
    done.raise_if_failed()


def _measures(
    widened: Case, random: Case, bundled: Case, scratch: Path, steps: int
) -> Mapping[str, Callable[[], dict[str, Any]]]:
    def on(layout: Any, measure: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        with Session(layout) as session:
            return {**measure(session), "limits_enforced": list(session.enforced)}

    def unequal_of(case: Case, kinds: tuple[str, str], rows: int) -> Callable[[], dict[str, Any]]:
        one = partial(unequal.measure, case=case, directory=scratch, kinds=kinds, rows_per_rank=rows, passes=steps)
        return lambda: on(four_unequal_ranks(), one)

    return {
        "exact": lambda: exactness.measure((bundled, random), scratch),
        "unequal": unequal_of(widened, ("code profile", "code"), 2),
        "unequal-random": unequal_of(random, ("profile", "measured"), 1),
        "cut": lambda: on(equal_ranks(), lambda session: change.cut_share(session, widened, scratch, rows_per_rank=1)),
        "switch": lambda: on(
            equal_ranks(), lambda session: change.switch_domain(session, widened, scratch, rows_per_rank=1)
        ),
        "watching": lambda: on(two_ranks(), lambda session: watching.measure(session, bundled, scratch)),
        "scaling": lambda: scaling.measure((widened, random), scratch, passes=steps),
        "halves": lambda: halves.measure(random, scratch),
    }
