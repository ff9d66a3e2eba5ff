"""The `poise` command.

Contract: `main()` never shows a user a traceback for something that they can put right. It prints one line on stderr
that starts with ``poise: `` and exits with 2 for bad input, 1 when reading or writing failed, 130 after Ctrl-C, 143 after
SIGTERM, which ends a run as tidily as Ctrl-C does.
An error in Poise itself does end in a traceback: it is a bug, and the traceback is what a report of it needs.
Not here: the commands (`app`), and anything that loads torch before a command needs it.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from poise.cli.app import app
from poise.cli.expert_parallel import Interrupted
from poise.errors import PoiseError, RankLostError, UsageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (``sys.argv`` when `arguments` is None) and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end a run
    # Before torch loads: OpenMP threads that spin for long take the core that reads and routing need; those that sleep at
    # once wake late (decision 013).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with _terminated_like_ctrl_c() as terminated:
        code = _run(arguments)
    if code == 130:
        # Python takes note of a KeyboardInterrupt that leaves code made from text, as dataclasses are while modules load, and
        # ends a `python -m` by SIGINT for it, though it was handled; running further text makes it forget.
        exec("")
    sys.exit(128 + signal.SIGTERM if terminated and code == 130 else code)


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM becomes a KeyboardInterrupt, and is noted in the list. A second one does not disturb the tidying up.

    Left as it is where it is ignored, and off the main thread, where no signal can be handled.
    """
    terminated: list[int] = []

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        terminated.append(number)
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield terminated
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="poise", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(_with_help_hint(error), 2)
    except UsageError as error:
        return _complain(str(error), 2)
    except RankLostError as error:
        code = 128 + signal.SIGTERM if error.was_told_to_end else 1
        return _complain(str(error), code) if error.is_speaker else code
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
