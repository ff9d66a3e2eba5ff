"""`poise demo` and `poise bench`: runs beside peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise.bench import BENCHMARKS
from poise.bench.parallel.part_names import PARALLEL, PROBE
from poise.cli.arguments import Json

commands = typer.Typer()


@commands.command(epilog="Example: poise demo")
def demo(json_output: Json = False) -> None:
    """Runs a small model with real routing under a tight memory budget, beside the plain baseline."""
    from poise.bench.demo import run_demo

    run_demo(json_output=json_output)


@commands.command(epilog="Example: poise bench reader --output benchmarks/results")
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Which benchmark: {', '.join(BENCHMARKS)}.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the result file to this directory.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART",
            help="Of a long benchmark, run this part only (may be repeated); keep the others. A part that is not there is "
            f"answered with those that are. Of `parallel`: {', '.join(PARALLEL)}; of its suite `probe`: {', '.join(PROBE)}.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of a long benchmark, measure so many decode steps and count the rest as their mean; of `parallel`, so many "
            "passes of each contender in each round.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", metavar="SUITE", help="Of a benchmark with suites, run this one: `parallel` has `probe`."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Runs a benchmark beside its peers, and prints how close each comes to the physical limit."""
    from poise.bench import run_benchmark

    run_benchmark(name, output=output, json_output=json_output, suite=suite, parts=part or (), steps=steps)
