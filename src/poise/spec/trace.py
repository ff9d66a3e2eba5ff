"""A routing trace: how many tokens each expert got, pass by pass. The format that planners and simulators read.

A step is one pass over the layers. Only real tokens count, never padding. An expert that a layer does not have counts 0.
Letters: N steps, L layers, R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from poise.errors import TraceError
from poise.spec.tensor_file import TensorFormat

Counts = npt.NDArray[np.int32]

TRACE_FORMAT = TensorFormat(
    kind="routing trace",
    version=1,
    required={"counts": ("I32", 3)},
    optional={"counts_by_rank": ("I32", 4)},
    fields={"model": str, "top_k": int, "layers": list, "tokens_per_step": list},
    remedy="write it with `poise record`",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTrace:
    """``counts_NLE``: int32, tokens that chose each expert in each step; ``layers``: absolute ids of the MoE layers.

    ``tokens_per_step`` are the real tokens of each step; a layer's counts sum to at most ``top_k`` times that (less where a
    router masks choices). ``counts_by_rank_NLRE`` sums to ``counts_NLE`` over the ranks on which the tokens were. Raises
    TraceError where that does not hold.
    """

    counts_NLE: Counts
    model: str
    top_k: int
    layers: tuple[int, ...]
    tokens_per_step: tuple[int, ...]
    counts_by_rank_NLRE: Counts | None = None

    def __post_init__(self) -> None:
        for name, array in (("counts", self.counts_NLE), ("counts_by_rank", self.counts_by_rank_NLRE)):
            dims = 3 if name == "counts" else 4
            if array is not None:
                _require(array.dtype == np.int32 and array.ndim == dims, f"{name} is not int32 of {dims} dimensions")
                _require(bool((array >= 0).all()), f"{name} has a count below 0")
        steps, num_layers, num_experts = self.counts_NLE.shape
        _require(min(steps, num_layers, num_experts) >= 1, f"counts has the shape {self.counts_NLE.shape}: it is empty")
        _require(1 <= self.top_k <= num_experts, f"top_k is {self.top_k} of {num_experts} experts")
        _require(len(self.layers) == num_layers, f"counts has {num_layers} layers and {len(self.layers)} have ids")
        _require(
            list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            "its layer ids do not rise from 0 or more",
        )
        _require(len(self.tokens_per_step) == steps, f"{len(self.tokens_per_step)} of {steps} steps say their tokens")
        most_N = np.array(self.tokens_per_step, dtype=np.int64) * self.top_k
        _require(bool((most_N > 0).all()), "a step has no token")
        chosen_NL = self.counts_NLE.sum(axis=2, dtype=np.int64)
        _require(bool((chosen_NL <= most_N[:, None]).all()), "a layer has more choices than its tokens make")
        if self.counts_by_rank_NLRE is not None:
            shape = self.counts_by_rank_NLRE.shape
            _require(
                (shape[0], shape[1], shape[3]) == self.counts_NLE.shape
                and np.array_equal(self.counts_by_rank_NLRE.sum(axis=2, dtype=np.int64), self.counts_NLE),
                "counts_by_rank does not sum to counts",
            )

    @property
    def load_LE(self) -> npt.NDArray[np.int64]:
        """Tokens that each expert got in all steps."""
        return np.asarray(self.counts_NLE.sum(axis=0, dtype=np.int64))

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises TraceError if it cannot be written."""
        by_rank = {} if self.counts_by_rank_NLRE is None else {"counts_by_rank": self.counts_by_rank_NLRE}
        fields = {
            "model": self.model,
            "top_k": self.top_k,
            "layers": list(self.layers),
            "tokens_per_step": list(self.tokens_per_step),
        }
        TRACE_FORMAT.save(path, {"counts": self.counts_NLE, **by_rank}, fields)

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Raises TraceError, one line that names the file and what is wrong, for anything but a trace of version 1."""
        tensors, fields = TRACE_FORMAT.load(path)
        try:
            return cls(
                counts_NLE=tensors["counts"],
                model=fields["model"],
                top_k=fields["top_k"],
                layers=tuple(fields["layers"]),
                tokens_per_step=tuple(fields["tokens_per_step"]),
                counts_by_rank_NLRE=tensors.get("counts_by_rank"),
            )
        except TraceError as error:
            raise TRACE_FORMAT.refusal(path, f"is damaged: {error}") from None


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise TraceError(problem)
