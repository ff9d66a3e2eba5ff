"""Progress of a command on standard error: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys

SECONDS_BETWEEN_LINES = 10.0
"""How often progress is reported where there is no terminal to draw a bar on."""


class Bar:
    """Progress on a terminal: a bar on standard error that can be taken away and put back."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4)
        self._task = self._bar.add_task("", total=total)
        self._on_screen = False

    def show(self, message: str, *, done: float, now_s: float) -> None:
        """Draws the bar, `done` of the total along, with the message before it."""
        self._bar.update(self._task, description=message, completed=done)
        if not self._on_screen:
            self._bar.start()
            self._on_screen = True

    def clear(self) -> None:
        """Takes the bar off the screen."""
        if self._on_screen:
            self._bar.stop()
            self._on_screen = False


class PlainLines:
    """Progress where standard error is a file or a pipe: a line now and then."""

    def __init__(self) -> None:
        self._next_s = SECONDS_BETWEEN_LINES

    def show(self, message: str, *, done: float, now_s: float) -> None:
        """Prints the message if the last one is long enough ago."""
        if now_s >= self._next_s:
            say(message)
            self._next_s = now_s + SECONDS_BETWEEN_LINES

    def clear(self) -> None:
        """Nothing to take away."""


def say(message: str) -> None:
    """Prints a line for people."""
    print(f"poise: {message}", file=sys.stderr, flush=True)
