"""A bar on standard error, where that is a terminal; silence where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, *, shown: bool = True) -> Iterator[Callable[[str, float], None]]:
    """Yields what is told (label, share of all that is done); the bar is gone when the block ends."""
    if not shown or not sys.stderr.isatty():
        yield lambda label, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda label, share: progress.update(task, description=f"{title}: {label}", completed=share)
