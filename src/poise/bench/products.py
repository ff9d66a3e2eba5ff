"""What matrix products take on this machine, measured with nothing of Poise's engine: the yardstick of a compute limit.

Plain ``torch.nn.functional.linear`` in the model's dtype or in fp32, whichever is faster at that shape and number of tokens,
with torch's own number of threads; weights take turns, so that they come from memory as an expert's do and not from the
processor's cache. A limit takes the time at the tokens that a matrix really got: the rate of a full product is out of reach
for an expert with three tokens, for any program.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from poise.cost.curves import PointCurve
from poise.profile.measure import Run, measure

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
POOL_BYTES = 192 << 20
"""Of the weights that take turns: several times a processor's cache."""
CAP_S = 30.0

Shape = tuple[int, int]
"""(outputs, inputs), as a weight lies in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """Time against tokens of one product of each shape, and how many threads computed it."""

    curves: Mapping[Shape, PointCurve]
    threads: int

    def seconds(self, shapes: Sequence[Shape], tokens: Any) -> Any:
        """Time of ``tokens`` (an array) through a matrix of every shape in turn; no tokens: no time."""
        return sum(self.curves[shape].seconds(tokens) * (tokens > 0) for shape in shapes)

    def as_json(self) -> dict[str, Any]:
        """GFLOP/s by shape and tokens, as a result file has it."""
        return {
            "threads": self.threads,
            "gflops_per_s": {
                f"{outputs}x{inputs}": {
                    str(tokens): round(2e-9 * outputs * inputs * tokens / float(curve.seconds(tokens)), 1)
                    for tokens in TOKENS
                }
                for (outputs, inputs), curve in self.curves.items()
            },
        }


def measure_products(shapes: Sequence[Shape], *, dtype: torch.dtype, cap_s: float = CAP_S) -> Products:
    """Medians of runs that take turns, until they are certain to 5 % or ``cap_s`` has passed for a dtype."""
    kinds = list(dict.fromkeys([dtype, torch.float32]))
    measured = [_seconds(list(dict.fromkeys(shapes)), each, cap_s) for each in kinds]
    curves = {
        shape: PointCurve(TOKENS, [min(times) for times in zip(*(one[shape] for one in measured), strict=True)])
        for shape in measured[0]
    }
    return Products(curves=curves, threads=torch.get_num_threads())


def _seconds(shapes: Sequence[Shape], dtype: torch.dtype, cap_s: float) -> dict[Shape, list[float]]:
    """Of every shape, at each of ``TOKENS``."""
    cases = [(shape, tokens) for shape in shapes for tokens in TOKENS]
    pools = {shape: _weights(shape, dtype) for shape in shapes}
    with torch.inference_mode():
        measured = measure([_run(pools[shape], shape, tokens, dtype) for shape, tokens in cases], cap_s=cap_s)
    times: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    for (shape, _), (measurement,) in zip(cases, measured, strict=True):
        times[shape].append(measurement.seconds)
    return times


def _weights(shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    each_bytes = shape[0] * shape[1] * dtype.itemsize
    count = max(1, POOL_BYTES // each_bytes)
    return [torch.full(shape, 0.01, dtype=dtype) for _ in range(count)]


def _run(pool: Sequence[torch.Tensor], shape: Shape, tokens: int, dtype: torch.dtype) -> Run:
    weights = itertools.cycle(pool)
    inputs = torch.full((tokens, shape[1]), 0.5, dtype=dtype)

    def run() -> tuple[float, ...]:
        weight = next(weights)
        begin = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        return (time.perf_counter() - begin,)

    return run
