"""What a model is, in numbers: shapes and bytes that planners and engines count with. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A mixture-of-experts causal language model.

    ``expert_bytes`` is the largest expert as it lies on disk. ``dense_bytes`` is everything that is not a routed expert,
    as it lies in memory. ``moe_layers`` are absolute layer ids; ``experts_L`` the number of experts of each of them.
    """

    architecture: str
    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    experts_L: tuple[int, ...]
    top_k: int
    hidden: int
    vocabulary: int
    context_tokens: int
    expert_bytes: int
    experts_bytes: int
    dense_bytes: int
    dtype: str

    @property
    def total_bytes(self) -> int:
        """All weights: dense part and routed experts."""
        return self.dense_bytes + self.experts_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What one sequence's cache takes: ``state_bytes + bytes_per_token * tokens`` (an upper bound where a window slides).

    Recurrent layers count in ``state_bytes`` only. ``movable_bytes_per_token``: those of the ``movable_layers`` whose keys and
    values can leave memory while other batches compute.
    """

    bytes_per_token: int
    largest_layer_bytes_per_token: int
    state_bytes: int
    movable_bytes_per_token: int = 0
    movable_layers: int = 0

    def sequence_bytes(self, tokens: int) -> int:
        """Cache bytes of one sequence of ``tokens`` tokens."""
        return self.state_bytes + self.bytes_per_token * tokens

    def on_disk(self) -> CacheSpec:
        """What is left in memory when all that can leave it has left; two batches' share of a layer is not counted."""
        left = self.bytes_per_token - self.movable_bytes_per_token
        return replace(self, bytes_per_token=left, movable_bytes_per_token=0, movable_layers=0)
