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
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=None)
        try:
            widen_checkpoint(
                arguments.source,
                arguments.target,
                arguments.factor,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except PoiseError as error:
            print(f"widen: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
