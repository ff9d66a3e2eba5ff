"""The `poise` command.

Contract: `main()` never shows a user a traceback for something that they can put right. It prints one line on stderr
that starts with ``poise: `` and exits with 2 for bad input, 1 when reading or writing failed, 130 after Ctrl-C.
An error in Poise itself does end in a traceback: it is a bug, and the traceback is what a report of it needs.
Not here: the commands (`app`), and anything that loads torch before a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from poise.cli.app import app
from poise.cli.generate import Interrupted
from poise.errors import PoiseError, UsageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (``sys.argv`` when `arguments` is None) and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end a run
    # Before torch loads: OpenMP threads that spin while they wait take the core that reads and routing need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="poise", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(_with_help_hint(error), 2)
    except UsageError as error:
        return _complain(str(error), 2)
    except PoiseError as error:
        return _complain(str(error), 1)
    except Interrupted as stop:
        return _complain(str(stop), 130)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)
    if code == 130:  # Typer turns a KeyboardInterrupt into this return value
        return _complain("interrupted", 130)
    return code if isinstance(code, int) else 0


def _with_help_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "poise"
    return f"{error.format_message().rstrip('.')}; `{command} --help` shows what is allowed"


def _complain(message: str, code: int) -> int:
    print("poise:", " ".join(message.split("\n")), file=sys.stderr)
    return code
