"""`poise bench exchange`: all-to-all over Gloo between the ranks of a cluster in a box, against sockets and link rates.

What a token exchange can cost at best. The limit of a link is its rate; that of loopback is what a plain TCP connection
moves, both ways at once, measured beside it. ``wire`` is what leaves a rank: its message without the part for itself.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from poise.bench.cluster.cluster import Cluster
from poise.bench.cluster.layout import GBIT_PER_S, ClusterLayout, four_unequal_ranks, slow_link, two_ranks
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.errors import PoiseError
from poise.units import MIB, format_bytes

SIZES_BYTES = (MIB // 4, 2 * MIB, 8 * MIB)
"""What each rank holds; 2 MiB is 1,024 tokens of 1,024 bf16 numbers."""
REPEATS = 30
SOCKET_S = 1.0
_WITHIN_S = 120.0


def run(output: Path | None, json_output: bool) -> None:
    """Run the benchmark; see ``poise.bench``."""
    layouts = (two_ranks(), two_ranks().with_link(4 * GBIT_PER_S), slow_link(), four_unequal_ranks())
    rows: list[dict[str, object]] = []
    enforced: list[str] = []
    missing: list[str] = []
    for layout in layouts:
        measured, held, lacking = measure(layout)
        rows += measured
        enforced += [f"{layout.name}: {each}" for each in held]
        missing += [f"{layout.name}: {each}" for each in lacking]
    stamped = stamp(limits_enforced=enforced, limits_missing=missing, environment={"OMP_NUM_THREADS": "1"})
    results = {"rows": rows, "repeats": REPEATS}
    if json_output:
        print(json.dumps(document("exchange", stamped, results)))
    else:
        _print(rows, missing)
    if output is not None:
        path = write_result(output, "exchange", stamped, results, today=date.today())
        Console(stderr=True).print(f"wrote {path}")


def measure(
    layout: ClusterLayout,
    *,
    sizes_bytes: tuple[int, ...] = SIZES_BYTES,
    repeats: int = REPEATS,
    socket_s: float = SOCKET_S,
) -> tuple[list[dict[str, object]], tuple[str, ...], tuple[str, ...]]:
    """Rows of one layout, the limits that held and those that could not be set. Raises PoiseError when a rank fails."""
    module = "poise.bench.cluster.exchange_rank"
    argv = [sys.executable, "-m", module, str(repeats), str(socket_s), *map(str, sizes_bytes)]
    with Cluster(layout) as cluster:
        result = cluster.run(argv, timeout_s=_WITHIN_S)
        enforced, missing = cluster.enforced, cluster.missing
    failed = next((rank for rank in result.ranks if rank.returncode != 0), None)
    if failed is not None:
        how = f"did not end within {_WITHIN_S:g} s" if result.timed_out else f"failed ({failed.stderr.strip()[-300:]})"
        raise PoiseError(f"{layout.name}: rank {failed.rank} {how}")
    measured = json.loads(result.ranks[0].stdout)
    has_link = layout.link_bytes_per_s is not None and not any(each.startswith("links") for each in missing)
    limit = float(layout.link_bytes_per_s or 0) if has_link else measured["socket_bytes_per_s"]
    rows = [
        _row(layout, int(size), seconds, limit, measured["socket_bytes_per_s"], measured["smallest_s"])
        for size, seconds in measured["seconds"].items()
    ]
    return rows, enforced, missing


def _row(
    layout: ClusterLayout, size: int, seconds: float, limit: float | None, sockets: float | None, smallest_s: float
) -> dict[str, object]:
    ranks = len(layout.ranks)
    wire_bytes = size // ranks * (ranks - 1)
    rate = wire_bytes / seconds
    return {
        "layout": layout.name,
        "ranks": ranks,
        "message_bytes": size,
        "wire_bytes": wire_bytes,
        "seconds": seconds,
        "bytes_per_s": rate,
        "limit_bytes_per_s": limit,
        "limit_frac": None if limit is None else rate / limit,
        "socket_bytes_per_s": sockets,
        "smallest_s": smallest_s,
    }


def _print(rows: list[dict[str, object]], missing: list[str]) -> None:
    table = Table(title="all-to-all, each rank, each way; times in ms")
    for name in ("ranks", "message", "wire", "ms", "MB/s", "limit", "share", "empty"):
        table.add_column(name, justify="left" if name == "ranks" else "right", no_wrap=True)
    for row in rows:
        number = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        limit = f"{number['limit_bytes_per_s'] / 1e6:.0f}" if "limit_bytes_per_s" in number else "-"
        table.add_row(
            str(row["layout"]),
            format_bytes(int(number["message_bytes"])),
            format_bytes(int(number["wire_bytes"])),
            f"{number['seconds'] * 1e3:.3g}",
            f"{number['bytes_per_s'] / 1e6:.0f}",
            limit,
            f"{number['limit_frac']:.0%}" if "limit_frac" in number else "-",
            f"{number['smallest_s'] * 1e3:.3g}",
        )
    Console().print(table)
    for each in missing:
        Console().print(f"not enforced: {each}")
