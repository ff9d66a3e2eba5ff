"""Makes a wider copy of a checkpoint: the same function and the same routing, expert bytes times ``--factor``.

python tools/widen.py src/poise/assets/tiny-moe /tmp/wide --factor 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from poise.errors import PoiseError
from poise.model.widen import widen_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of the checkpoint")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--factor", type=int, required=True, help="copies of each expert neuron: a power of two")
    arguments = parser.parse_args()
    progress = Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    task = progress.add_task("", total=None)

    def show(done: int, total: int) -> None:
        progress.start()  # only now: what is wrong with the input has been said without a bar
        progress.update(task, completed=done, total=total)

    try:
        widen_checkpoint(arguments.source, arguments.target, arguments.factor, on_progress=show)
    except PoiseError as error:
        _stop(progress)
        print(f"widen: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        _stop(progress)


def _stop(progress: Progress) -> None:
    if progress.live.is_started:  # else an empty line would be printed
        progress.stop()


if __name__ == "__main__":
    main()
