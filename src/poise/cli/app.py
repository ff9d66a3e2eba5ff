"""What a user can type: the `poise` command itself, and all its commands with their options and help.

Contract: the commands and flags are those of the architecture page; each help holds an example; nothing here imports
torch or transformers before a command needs them, so that `poise --help` answers at once.
Not here: what a command does. It checks nothing but types; ranges are checked where the values are used.
"""

from __future__ import annotations

from typing import Annotated

import typer

import poise
from poise.cli import bench_commands, measure_commands, run_commands

app = typer.Typer(
    name="poise",
    help="Runs mixture-of-experts language models that are larger than memory.",
    epilog='Example: poise generate ./OLMoE-1B-7B "The capital of France is" --memory 4GiB',
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"poise {poise.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None and (text := context.get_help()):  # with Rich it prints, and returns nothing
        typer.echo(text)


for group in (run_commands, measure_commands, bench_commands):
    app.add_typer(group.commands)
