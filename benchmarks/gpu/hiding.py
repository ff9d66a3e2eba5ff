"""Whether replicas come for nothing: a rank's experts with and without the weights of three others arriving meanwhile.

Arrivals: over PCIe from pinned memory, by a copy engine, as `--balance probe` brings them; and inside the GPU's memory, by
few multiprocessors or as the driver copies, which stands for what an arrival over NVLink costs at its far end. Layers
repeat until they outlast the transfer, so that what is measured is disturbance, not a window that is too short.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np
import torch

from benchmarks.gpu.layers import TOKENS, GroupedExperts, load_of, rows_for
from benchmarks.gpu.timing import device_s

MODEL, REPLICAS = "Qwen3-235B-A22B", 3
RATE_BYTES = 256 << 20
COVER = 1.3
"""Times the transfer that repeated layers last."""
SM_COUNTS = (1, 2, 4, 8, 16, 32)


def pcie_bytes_per_s() -> dict[str, float]:
    """Copies of one large piece, each way."""
    host = torch.empty(RATE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(RATE_BYTES, dtype=torch.uint8, device="cuda")
    times = device_s(
        {
            "to_device": lambda: there.copy_(host, non_blocking=True),
            "to_host": lambda: host.copy_(there, non_blocking=True),
        },
        rounds=8,
    )
    return {name: RATE_BYTES / seconds for name, seconds in times.items()}


def hiding() -> list[dict[str, object]]:
    """A row for each phase and way of arriving."""
    rows: list[dict[str, object]] = []
    for phase in TOKENS:
        _, load = load_of(phase)
        balanced_E, static_E = load.balanced_E, load.static_E
        experts = GroupedExperts(MODEL, max(len(balanced_E), len(static_E)))
        layers = {name: _layer(experts, tokens_E) for name, tokens_E in (("own", balanced_E), ("static", static_E))}
        alone = device_s(layers)
        common = {
            "phase": phase,
            "pairs": int(balanced_E.sum()),
            "static_pairs": int(static_E.sum()),
            "imbalance_before": load.fullest_before / load.mean,
            "imbalance_after": load.fullest_after / load.mean,
            "layer_s": alone["own"],
            "static_layer_s": alone["static"],
        }
        for way, arrive, nbytes in _arrivals(experts.expert_bytes):
            rows.append({**common, "way": way, "bytes": nbytes, **_beside(layers["own"], alone["own"], arrive)})
    return rows


def _layer(experts: GroupedExperts, tokens_E: np.ndarray) -> Callable[[], object]:
    spread_E = np.zeros(len(experts.up_ENH), dtype=np.int64)
    spread_E[: len(tokens_E)] = tokens_E
    rows_PH, ends_E = rows_for(spread_E, experts.hidden)
    return lambda: experts(rows_PH, ends_E)


def _beside(layer: Callable[[], object], layer_s: float, arrive: Callable[[], object]) -> dict[str, object]:
    side = torch.cuda.Stream()

    def arriving() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            arrive()

    def only_arriving() -> None:
        arriving()
        torch.cuda.current_stream().wait_stream(side)

    copy_s = device_s({"copy": only_arriving})["copy"]
    count = ceil(COVER * copy_s / layer_s)

    def computing() -> None:
        for _ in range(count):
            layer()

    def both() -> None:
        arriving()
        computing()
        torch.cuda.current_stream().wait_stream(side)

    times = device_s({"alone": computing, "beside": both})
    exposed_s = times["beside"] - times["alone"]
    return {
        "copy_s": copy_s,
        "layers_repeated": count,
        "alone_s": times["alone"],
        "beside_s": times["beside"],
        "exposed_frac": exposed_s / times["alone"],
        "exposed_of_copy_frac": exposed_s / copy_s,
        "layers_to_hide": copy_s / layer_s,
    }


def _arrivals(expert_bytes: int) -> list[tuple[str, Callable[[], object], int]]:
    host = [torch.empty(expert_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(REPLICAS)]
    near = [torch.empty(expert_bytes, dtype=torch.uint8, device="cuda") for _ in range(REPLICAS)]
    slots = [torch.empty_like(each) for each in near]

    def copies(sources: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: [slot.copy_(one, non_blocking=True) for slot, one in zip(slots, sources, strict=True)]

    outward, leaving = torch.cuda.Stream(), [torch.empty_like(one).pin_memory() for one in host]

    def both_ways() -> None:
        outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(outward):
            for one, home in zip(leaving, near, strict=True):
                one.copy_(home, non_blocking=True)
        copies(host)()
        torch.cuda.current_stream().wait_stream(outward)

    nbytes = REPLICAS * expert_bytes
    ways = [
        ("PCIe, copy engine", copies(host), nbytes),
        ("PCIe, as many the other way", both_ways, nbytes),
        ("inside, as the driver copies", copies(near), nbytes),
    ]
    copy = _capped_copy()
    for count in SM_COUNTS:

        def capped(count: int = count) -> None:
            for slot, one in zip(slots, near, strict=True):
                copy(slot, one, count)

        ways.append((f"inside, {count} multiprocessors", capped, nbytes))
    return ways


def _capped_copy() -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """A copy by a kernel of so many blocks. Compiled by Triton, which comes with torch for GPUs."""
    from benchmarks.gpu.capped_copy import capped_copy

    return capped_copy
